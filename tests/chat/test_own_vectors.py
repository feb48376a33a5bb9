"""The project's own vectors: results of DeepSeek's code for inputs of ours, kept in a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fathom.errors import RequestError
from tests.chat.samples import read_stream
from tests.chat.test_vectors import READERS, RequestOptions, calls_of
from tests.chat.write_vectors import FILE, build, text_of

VECTORS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n") if line]
REQUESTS = [vector for vector in VECTORS if "api" in vector]
COMPLETIONS = [vector for vector in VECTORS if "api" not in vector]


def test_the_file_is_what_the_oracle_says() -> None:
    pytest.importorskip("deepseek_recipe", reason="needs the package deepseek-recipe")
    current = FILE.read_text(encoding="utf-8")
    assert text_of(build()) == current, "stale: run python -m tests.chat.write_vectors"
    assert len(REQUESTS) > 40
    assert len(COMPLETIONS) > 12


@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector["name"])
def test_requests(vector: dict[str, Any]) -> None:
    expected = vector["expected"]
    if expected["status"] != 200:
        with pytest.raises(RequestError) as failure:
            READERS[vector["api"]](vector["input"], RequestOptions())
        assert failure.value.param
        return
    request = READERS[vector["api"]](vector["input"], RequestOptions())
    assert request.prompt() == expected["prompt"]
    assert (request.thinking != "off") == expected["thinking"]
    at, ranges = 0, list[list[int]]()
    for segment in request.segments():
        if segment.special:
            ranges.append([at, at + len(segment.text)])
        at += len(segment.text)
    assert ranges == expected["special"]


@pytest.mark.parametrize("vector", COMPLETIONS, ids=lambda vector: vector["name"])
def test_completions(vector: dict[str, Any]) -> None:
    given, expected = vector["input"], vector["expected"]
    for pieces in ([given["text"]], list(given["text"])):
        found, _ = read_stream(pieces, "high" if given["thinking"] else "off", trim=True)
        assert (found.reasoning, found.content) == (expected["reasoning"], expected["content"])
        assert calls_of(found) == expected["tool_calls"]

"""`fathom serve` as a process of its own: what it keeps in folders outlives it."""

from __future__ import annotations

import contextlib
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from fathom.cli.main import app

pytestmark = pytest.mark.timeout(300)  # the first run on a machine compiles the decoder
STORY = "Tell me more of this: " + "there was a house by the sea, and " * 40


@contextlib.contextmanager
def server(*options: str | Path) -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "fathom", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        try:
            assert " answers at " in said, said + process.stderr.read()
            url = said.split(" answers at ")[1].split()[0]
            with httpx2.Client(base_url=url, timeout=100, trust_env=False) as client:
                yield client, process
        finally:
            process.kill()
            process.communicate()


def chat(client: httpx2.Client, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 8} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def cached(reply: Any) -> tuple[int, int]:
    usage = reply["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def stream(client: httpx2.Client, **fields: Any) -> Iterator[str]:
    """Text of a long reply as it comes, thoughts included."""
    user = [{"role": "user", "content": STORY}]
    body = {"messages": user, "stream": True, "max_tokens": 20_000, "temperature": 2, **fields}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    delta = choice["delta"]
                    yield (delta.get("reasoning_content") or "") + (delta.get("content") or "")


def test_what_was_computed_and_what_was_said_outlives_the_server(tmp_path: Path) -> None:
    cache, logs = tmp_path / "cache", tmp_path / "logs"
    options = ("--disk-cache", cache, "--token-log", logs)
    with server(*options) as (client, process):
        first = chat(client, seed=1)
        assert cached(first)[0] == 0
        shown = ""
        # Nobody gives a seed: only the log knows what has been drawn.
        with contextlib.suppress(httpx2.TransportError):
            for text in stream(client):
                shown += text
                if len(shown) > 20:
                    process.send_signal(signal.SIGKILL)
    (log,) = logs.glob("*.wal")

    with server(*options) as (client, process):
        again = chat(client, seed=1)
        known, asked = cached(again)
        assert known == asked
        assert again["choices"] == first["choices"]
        assert f"fathom_engine_cached_tokens_total {asked}" in client.get("/metrics").text
        other = stream(client, max_tokens=19_999)  # asked in other words: not that reply
        assert next(text for text in other if text)
        other.close()
        assert log.exists()
        text = ""
        for piece in stream(client):
            text += piece
            if len(text) > len(shown):
                break
        assert text.startswith(shown)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    assert not log.exists()  # its client left, and nobody waits for it
    with server(*options) as (client, _):
        assert cached(chat(client, seed=1)) == (asked, asked)
    for path in [*cache.glob("*/*"), *logs.glob("*")]:  # they tell what was said
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--disk-cache", "/proc/nothing"], "cache folder /proc/nothing cannot be used"),
        (["--token-log", "/proc/nothing"], "log folder /proc/nothing cannot be used"),
        (["--token-log", "/proc/sys"], "log folder /proc/sys cannot be used"),
        (["--disk-cache", "{}"], "holds other files"),
        (["--disk-cache-size", "1GiB"], "of no use without --disk-cache"),
        (["--disk-cache", "x", "--disk-cache-size", "much"], "--disk-cache-size is 'much'"),
        (["--host-cache-size", "-1"], "--host-cache-size is '-1'"),
        (["--host-cache-size", "900TiB"], "GiB of main memory"),
        (["--checkpoint-spacing", "100"], "multiple of 256"),
        (["--index-keys", "fp2"], "fp4 or fp8"),
        (["--drafts", "8"], "less than or equal to 7"),
        (["--cache-tokens", "999999999999999"], "lower cache_tokens"),
        (["--upstream", "http://127.0.0.1:9", "--drafts", "1"], "exclude each other"),
        (["--model", "scripted", "--drafts", "1"], "has no engine"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anybody_connects(
    options: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = CliRunner().invoke(app, ["serve", *(o.format(tmp_path) for o in options)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_chat_takes_a_folder_too(tmp_path: Path) -> None:
    arguments = ["chat", "--disk-cache", str(tmp_path), "--max-tokens", "3"]
    assert CliRunner().invoke(app, arguments, input="hello\n").exit_code == 0
    assert list(tmp_path.rglob("state-*"))
    arguments += ["--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, arguments, input="hello\n")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr

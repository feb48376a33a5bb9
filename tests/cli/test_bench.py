"""`fathom bench` as a user meets it; no test looks at how long anything took."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fathom.cli import bench
from fathom.cli.bench import token_bytes
from fathom.cli.main import app
from fathom.engine import load
from fathom.errors import FathomError, MissingDependency
from fathom.eval import speed
from fathom.eval.speed import ProcessSide, Result, Timing
from fathom.sandbox.substrates.choice import program_of, suited

SMALL = ["bench", "decode", "--tokens", "2", "--context", "20", "--rounds", "2", "--threads", "1"]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_decode_as_json():
    result = run(*SMALL, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {(r["side"], r["threads"]) for r in report["results"]} == {
        ("fathom", 1),
        ("fathom-f32", 1),
        ("fathom-generate", 1),
    }
    assert all(len(r["decode_rounds"]) == 2 for r in report["results"])
    assert set(report["best"]) == {"fathom", "fathom-f32", "fathom-generate"}
    assert report["machine"]["cores"] >= 1
    assert "times_transformers" not in report


def test_decode_as_text():
    lines = run(*SMALL).stdout.splitlines()
    table = [line.split() for line in lines if line.strip().startswith("fathom")]
    names = ("fathom", "fathom-f32", "fathom-generate")
    assert [row[:2] for row in table] == [[name, "1"] for name in names]
    assert "copies" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "two"], "give numbers with commas"),
        (["--threads", "0"], "give numbers with commas"),
        (["--against", "vllm"], "only transformers"),
        (["--tokens", "0"], "--tokens"),
        (["--model", "nowhere"], "nowhere"),
        (["--context", "2000000"], "exceed the model's context"),
    ],
)
def test_wrong_usage(arguments, words):
    result = run("bench", "decode", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_package_without_its_checkout_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    result = run(*SMALL, "--against", "transformers", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "dependency_missing"


def test_what_another_process_lacks_is_an_error_here(tmp_path):
    script = """print('{"missing": "Run: pip install x"}')"""
    with pytest.raises(MissingDependency, match="pip install x"):
        ProcessSide("other", [sys.executable, "-c", script], tmp_path)


def test_a_process_that_dies_is_an_error_here(tmp_path):
    with pytest.raises(FathomError, match="exit code 7"):
        ProcessSide("other", [sys.executable, "-c", "raise SystemExit(7)"], tmp_path)
    late = """print('{"versions": {}}', flush=True); input(); raise SystemExit(8)"""
    side = ProcessSide("other", [sys.executable, "-c", late], tmp_path)
    with pytest.raises(FathomError, match="exit code 8"):
        side.measure([1], [2], 1)


@dataclass
class Other:
    """Logits of another implementation."""

    values: np.ndarray

    def logits(self, tokens: list[int], file: Path) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("wrong", [0.1, np.nan])
def test_another_model_is_not_compared(wrong):
    llm = load("nano", quantized=False)
    own = llm.logits([7, 8]).numpy()
    assert bench._difference(llm, Other(own + 1e-4), [7, 8]) == pytest.approx(1e-4, rel=0.1)
    other = own.copy()
    other[1, 3] += wrong
    with pytest.raises(FathomError, match="other logits"):
        bench._difference(llm, Other(other), [7, 8])


@dataclass
class Scripted:
    """A side whose rounds take the seconds it is told; the first is the one to warm up."""

    name: str
    seconds: dict[int, list[float]]

    def measure(self, prompt: list[int], following: list[int], threads: int) -> Timing:
        return Timing(prefill=2.0, decode=self.seconds[threads].pop(0), decoded=len(following))


def test_each_side_is_compared_at_its_best_within_each_round():
    sides = [
        Scripted("a", {1: [99.0, 1.0, 2.0, 1.0], 2: [99.0, 4.0, 4.0, 4.0]}),
        Scripted("b", {1: [99.0, 9.0, 9.0, 9.0], 2: [99.0, 8.0, 8.0, 4.0]}),
    ]
    seen: list[int] = []
    results = speed.take_turns(sides, [1] * 10, [1] * 8, [1, 2], 3, seen.append)
    assert seen == [0, 1, 2, 3]
    assert speed.best(results, "a").threads == 1
    assert speed.best(results, "b").threads == 2
    assert speed.best(results, "a").decode == speed.Rate(median=8.0, low=4.0, high=8.0)
    assert speed.best(results, "a").prefill.median == 5.0
    assert speed.ratio(results, "a", "b") == speed.Rate(median=4.0, low=4.0, high=8.0)


def test_rates_count_the_tokens_that_were_decoded():
    result = Result(
        side="a",
        threads=1,
        prompt=3,
        timings=(Timing(prefill=1.0, decode=2.0, decoded=10),),
    )
    assert result.to_json()["decode_rounds"] == [5.0]


def test_bytes_read_for_a_token():
    """Counted from the shapes: a parameter is 2 bytes if bfloat16 holds it exactly, else 4."""
    model = load("nano").model
    config = model.config
    total = 4 * config.hidden_size  # the row of the embedding, kept in float32
    for name, p in model.named_parameters():
        if name.startswith(("mtp.", "embed.")):
            continue
        # What is matrix-multiplied is stored as read; the rest is small and kept in float32.
        small = p.dim() == 1 or "hc_" in name or name.endswith("ape")
        size = 4 if small or not bool((p.bfloat16().float() == p).all()) else 2
        share = config.num_experts_per_tok / config.n_routed_experts if "experts.w" in name else 1
        share = 1 if "shared" in name else share
        total += round(p.numel() * size * share)
    total += config.num_hash_layers * 8 * config.num_experts_per_tok  # a row of each table
    assert token_bytes(model) == total


def test_random_tokens_are_the_same_everywhere():
    tokens = speed.random_tokens(4096, 5)
    assert tokens == speed.random_tokens(4096, 9)[:5]
    assert min(speed.random_tokens(4096, 2000)) >= 300
    assert max(speed.random_tokens(8, 100)) < 8


def test_sandbox_exec():
    if not any(map(program_of, suited())):
        pytest.skip("no substrate of a sandbox is installed")
    result = run("bench", "sandbox-exec", "--count", "3", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    times = list(report["exec_ms"].values())
    assert times == sorted(times)
    assert times[0] > 0
    assert report["substrate"] in ("crun", "runc", "bubblewrap")


def test_a_failing_command_is_not_a_fast_one(monkeypatch):
    if not any(map(program_of, suited())):
        pytest.skip("no substrate of a sandbox is installed")
    monkeypatch.setattr(bench, "COMMAND", ["false"])
    result = run("bench", "sandbox-exec", "--count", "1")
    assert result.exit_code == 1
    assert "exit code 1" in result.stderr

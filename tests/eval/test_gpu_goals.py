"""Goals of the GPU path: each passes, falls short by something, or was not measured and says so."""

from __future__ import annotations

from typing import Any

from fathom.eval.gpu_goals import WHOLE, Goal, goals


def report(**changes: Any) -> dict[str, Any]:
    """Figures as one H100 has given them, or nearly."""
    steps = [
        {"kind": WHOLE, "tokens": 1, "context": context, "median": median}
        for context, median in ((4096, 8.73), (900_000, 9.27), (1_048_576, 13.0))
    ]
    prompts = [
        {"kind": "all", "tokens": tokens, "chunk": chunk, "routing": "own router",
         "median": median, "tokens_per_s": tokens / median * 1e3, "peak": 3 * 2**29}
        for tokens, chunk, median in (
            (8192, 8192, 42.83), (32_768, 16_384, 166.74), (32_768, 8192, 184.42)
        )
    ]  # fmt: skip

    def kernel(part: str, us: float, megabytes: float, name: str = "linear") -> dict[str, Any]:
        return {"part": part, "us": us, "num_bytes": int(megabytes * 1e6), "kernel": name,
                "calls": 1}  # fmt: skip

    short = [
        kernel("SWA low", 7.2, 6.3), kernel("CSA low, plain", 9.0, 16.0),
        kernel("SWA wo b", 18.3, 33.6), kernel("SWA experts up", 28.0, 53.7),
        kernel("CSA experts up", 40.0, 53.7), kernel("CSA index keys", 3.0, 0.07),
        kernel("head", 500.0, 1059.0), kernel("SWA attn site", 4.0, 1.6),
    ]  # fmt: skip
    long = [kernel("CSA index keys", 20.0, 17.8), kernel("HCA entries", 8.0, 4.9)]
    return {
        "copy_bytes_per_s": 2.98e12,
        "matmul_flops": 776e12,
        "steps": steps,
        "prompts": prompts,
        "expert_flops": 398e12,
        "topk_us": 22.0,
        "kernels": {"4096": short, "1048576": [*short, *long]},
        "boundary_us": 11.3,
        "transformers": {"tokens": 8192, "seconds": 0.474},
    } | changes


def by_name(found: list[Goal]) -> dict[str, Goal]:
    return {goal.name: goal for goal in found}


def test_every_goal_has_a_verdict() -> None:
    found = by_name(goals(report()))
    verdicts = {name: goal.verdict for name, goal in found.items()}
    assert verdicts["decode, a layer at 4K"] == "pass"
    assert verdicts["decode, a layer at 1M"] == "short by 1%"
    assert verdicts["stretch: decode, a layer at 4K"] == "short by 69%"
    assert verdicts["decode at 900K above 4K"] == "pass"
    assert found["decode at 900K above 4K"].found is not None
    assert 6 < found["decode at 900K above 4K"].found < 7
    assert verdicts["prefill of 8K beside transformers"] == "pass"
    assert verdicts["prefill of 8K above the weights"] == "pass"
    assert verdicts["prefill rate at 32K by 16,384 over 8K by 8,192"] == "pass"
    assert verdicts["prefill rate at 32K by 8,192 over 8K by 8,192"] == "short by 7%"
    assert verdicts["prefill experts, of the BF16 matmul rate"] == "pass"
    rates = {
        name.removesuffix(", of the copy rate"): verdict
        for name, verdict in verdicts.items()
        if name.endswith("of the copy rate")
    }
    assert rates == {
        "SWA low, 6.3 MB (linear)": "short by 51%",
        "CSA low, plain, 16.0 MB (linear)": "short by 1%",
        "SWA wo b, 33.6 MB (linear)": "pass",
        # Of two with the same bytes each has its own verdict.
        "SWA experts up, 53.7 MB (linear)": "pass",
        "CSA experts up, 53.7 MB (linear)": "short by 25%",
        "head, 1059.0 MB (linear)": "pass",
        # Those with few bytes are not judged, and of no kernel it is said that there is none.
        "CSA index keys, 17.8 MB (linear)": "short by 50%",
        "HCA entries, 4.9 MB (linear)": "short by 66%",
        **dict.fromkeys(("high", "wo a", "shared up", "experts down"), "not measured"),
    }
    assert verdicts["choice among 262,144"] == "pass"
    assert found["one mHC boundary"].found == 11.3


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    some = report(steps=[], prompts=[], transformers=None, topk_us=None, expert_flops=None,
                  boundary_us=None)  # fmt: skip
    del some["kernels"]
    for goal in goals(some):
        assert goal.verdict == "not measured"
        assert goal.met is None
        assert goal.cells()[2] == "-"

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
        {"kind": "all", "tokens": tokens, "routing": "own router", "median": median,
         "tokens_per_s": tokens / median * 1e3, "peak": 3 * 2**29}
        for tokens, median in ((8192, 42.83), (32_768, 166.74))
    ]  # fmt: skip
    kernels = [["_linear", 15, 198.0], ["_up", 3, 85.0], ["_down", 3, 63.0], ["_scores", 1, 3.0],
               ["_write_and_mix", 6, 26.0], ["_read", 6, 42.0]]  # fmt: skip
    sizes = {"linears, router logits, shared up": 400e6, "experts up": 161e6,
             "experts down": 104e6, "index scores": 17.8e6}  # fmt: skip
    return {
        "copy_bytes_per_s": 2.98e12,
        "matmul_flops": 776e12,
        "steps": steps,
        "prompts": prompts,
        "expert_flops": 398e12,
        "topk_us": 22.0,
        "kernels": {"4096": kernels, "1048576": [*kernels[:3], ["_scores", 1, 20.0]]},
        "kernel_bytes": {"4096": sizes, "1048576": sizes},
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
    assert verdicts["prefill rate at 32K over 8K"] == "pass"
    assert verdicts["prefill experts, of the BF16 matmul rate"] == "pass"
    assert verdicts["experts down at 4,096, of the copy rate"] == "short by 8%"
    assert verdicts["linears, router logits, shared up at 4,096, of the copy rate"] == "pass"
    assert verdicts["choice among 262,144"] == "pass"
    assert found["one mHC boundary"].found == 2 * 68 / 12
    # Scores of a short context read next to nothing: no goal is meant for them.
    assert [name for name in found if "index scores" in name] == [
        "index scores at 1,048,576, of the copy rate"
    ]
    assert verdicts["index scores at 1,048,576, of the copy rate"] == "short by 50%"


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    some = report(steps=[], prompts=[], transformers=None, topk_us=None, expert_flops=None)
    del some["kernels"]
    for goal in goals(some):
        assert goal.verdict == "not measured"
        assert goal.met is None
        assert goal.cells()[2] == "-"

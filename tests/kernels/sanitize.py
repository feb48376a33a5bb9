"""Every CUDA kernel on a few inputs, against its reference: what compute-sanitizer is run on.

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize 0 3  # every third case

Attention has V4-Flash's shape, everything else is as small as its tiles allow, since the tools slow
kernels down a thousand times. Prints a line for each case; the exit status is the number of cases
that gave wrong results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from tests.kernels import test_entries as entries
from tests.kernels import test_few as few
from tests.kernels import test_prefill as prefill
from tests.kernels import test_stored as stored
from tests.kernels.stored_cases import ODD, Sizes

SIZES = Sizes(hidden=512, heads=64, head_dim=512, index_heads=64, topk=64, inner=256, chosen=3)
Case = tuple[Callable[..., None], dict[str, Any]]


def cases(s: Sizes) -> Iterator[Case]:
    """Test functions with the values of their parameters."""
    every: dict[str, Any] = {"s": s, "dtype": torch.bfloat16}
    for op, tokens in (("stored_linear", 1), ("stored_linear", 17), ("chunk_linear", 70)):
        yield stored.test_linear, every | {"op": op, "tokens": tokens, "norm": tokens == 17}
        yield stored.test_grouped_linear_reads_its_own_columns, every | {"op": op, "tokens": tokens}
    for op, tokens in (("mhc_boundary", 3), ("chunk_mhc_boundary", 70)):
        for mode in ("first", "attention", "experts"):
            yield stored.test_mhc_boundary, every | {"op": op, "tokens": tokens, "mode": mode}
    yield stored.test_the_last_write_and_the_merge, every
    yield stored.test_where_a_step_begins_and_ends, every | {"tokens": 16}
    yield stored.test_logits, every | {"tokens": 65}
    for kind in (0, 4, 128):
        yield prefill.test_entries, every | {"kind": kind, "start": 120, "tokens": 9, "known": 0}
        yield prefill.test_attention, every | {"kind": kind, "start": 300, "tokens": 70}
        for position in (5, 700):
            yield entries.test_entry_attention, every | {"kind": kind, "position": position}
        for pieces in entries.PIECES:
            yield entries.test_store_entries, every | {"kind": kind, "pieces": pieces, "known": 0}
    for keys in ("fp4", "fp8"):
        yield entries.test_index_scores, every | {"position": 4099, "keys": keys}
        yield prefill.test_picks, every | {"start": 2043, "tokens": 40, "keys": keys}
    yield entries.test_store_fp8_keys, every | {"pieces": "across a window of 4"}
    yield prefill.test_fp8_keys, every | {"start": 120, "tokens": 9}
    patch = {"monkeypatch": pytest.MonkeyPatch()}
    for shape in ("random", "clustered", "all equal"):
        yield entries.test_topk, every | patch | {"shape": shape}
    yield prefill.test_select, every | patch | {"shape": "ties"}
    for op, tokens, routing in (
        ("stored_moe", 1, "bias"), ("stored_moe", 20, "one expert"), ("chunk_moe", 70, "hash"),
    ):  # fmt: skip
        yield stored.test_moe, every | patch | {"op": op, "tokens": tokens, "routing": routing}
    yield few.test_routing_lists_every_pair_once_by_expert, {"tokens": 15, "way": "bias"}


def main() -> int:
    """Run all cases; returns how many failed."""
    failed = 0
    first, every = map(int, sys.argv[1:3] or (0, 1))
    for s in (SIZES, ODD):
        for function, values in islice(cases(s), first, None, every):
            shown = {k: v for k, v in values.items() if k not in ("s", "dtype", "monkeypatch")}
            try:
                function(**values)
                torch.cuda.synchronize()
                said = "ok"
            except AssertionError as error:
                failed += 1
                said = f"wrong: {str(error).splitlines()[:1]}"
            sys.stdout.write(f"{said} {s.head_dim} {function.__name__} {shown}\n")
            sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())

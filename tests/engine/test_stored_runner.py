"""The runner over stored formats, here over its operations' references: the engine's promises hold.

On a GPU the engine's own tests run with it; see the `device` of conftest.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine
from fathom.engine.scheduler import Budget
from fathom.engine.stored_runner import StoredRunner
from fathom.engine.torch_runner import TorchRunner
from fathom.errors import ConfigError
from fathom.kernels import registry, use_backend
from fathom.model import Transformer
from fathom.model.stored import StoredModel, unstorable
from tests.engine.helpers import (
    bits,
    drop_host,
    engine,
    finish,
    greedy,
    model,
    prompt,
    sampled,
    stored_model,
)
from tests.engine.test_speculative import Oracle
from tests.model.tiny import as_stored


@pytest.fixture(scope="module")
def net() -> Transformer:
    return stored_model(num_nextn_predict_layers=1)


def serve(net: Any, **settings: Any) -> Engine:
    with use_backend("triton"):
        made = engine(net, **settings)
    assert isinstance(made.runner, StoredRunner)
    return made


@pytest.fixture(autouse=True)
def _to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's matrix products add up in another order for other numbers of rows."""

    def by_row(op: str, rows: tuple[int, ...], names: tuple[str, ...] = ()) -> None:
        whole = registry._kernels[op, "reference"]

        def call(*args: Any, **kwargs: Any) -> Any:
            found = []
            for t in range(len(args[rows[0]])):
                own = [a[t : t + 1] if i in rows else a for i, a in enumerate(args)]
                more = {
                    n: v[t : t + 1] if n in names and v is not None else v
                    for n, v in kwargs.items()
                }
                found.append(whole(*own, **more))
            if isinstance(found[0], torch.Tensor):
                return torch.cat(found)
            return tuple(
                torch.cat(parts) if parts[0] is not None else None
                for parts in zip(*found, strict=True)
            )

        monkeypatch.setitem(registry._kernels, (op, "reference"), call)

    as_stored(monkeypatch)
    by_row("stored_linear", (0,))
    by_row("stored_moe", (0, 1))
    by_row("stream_head", (1,))
    by_row("mhc_boundary", (0,), ("y", "pairs", "post", "comb"))


def test_the_torch_model_says_the_same(net: Transformer) -> None:
    """Two sequences side by side, in pieces of one to eight rows, past a window of 128."""
    stored = serve(net)
    with use_backend("reference"):
        plain = engine(net)
    assert isinstance(plain.runner, TorchRunner)
    streams, logits = [], []
    for served in (stored, plain):
        for slot in range(2):
            served.memory.tables[slot, 0] = slot
        starts, own = [0, 0], []
        for sizes in [(1, 3), (1, 8), (6, 1), (8, 2)] * 9:
            pieces = []
            for slot, size in enumerate(sizes):
                tokens = prompt(200, slot)[starts[slot] : starts[slot] + size]
                pieces.append(Piece(slot=slot, start=starts[slot], tokens=tokens))
                starts[slot] += size
            served.runner.forward(Batch.of(pieces))
            own.append(np.stack([served.runner.streams(row) for row in range(sum(sizes))]))
        streams.append(np.concatenate(own))
        logits.append(served.runner.logits([0, sum(sizes) - 1])[1])
    found, expected = streams
    size = [np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (found - expected, expected)]
    errors = size[0] / size[1]
    # A sum in another order now and then rounds a code the other way; later tokens may see it.
    assert np.mean(errors < 1e-4) > 0.8, errors
    assert np.max(errors) < 0.5
    assert np.linalg.norm(logits[0] - logits[1]) < 0.3 * np.linalg.norm(logits[1])


def test_the_same_bits_in_every_batch_and_cut(net: Transformer) -> None:
    expected = None
    for cut, beside in ((512, 0), (7, 2), (33, 3)):
        served = serve(net, budget=Budget(tokens=cut, beside_streams=cut))
        request = served.submit(prompt(40), sampled(5))
        others = [served.submit(prompt(3 + 4 * i, i), sampled(3)) for i in range(beside)]
        finish(served, request, *others)
        expected = expected or bits(request)
        assert bits(request) == expected


@pytest.mark.parametrize(("start", "right"), [(29, 0), (124, 2)])
def test_rejected_drafts_leave_nothing_behind(net: Transformer, start: int, right: int) -> None:
    """Rejections inside windows of 4 and across the end of one of 128."""
    plain, quick = serve(net), serve(net, drafts=3, drafts_adaptive=False)
    known = prompt(start)
    alone, request = (made.submit(known, sampled(10, seed=start)) for made in (plain, quick))
    finish(plain, alone)
    Oracle([d.token for d in alone.output], right).attach(request)
    finish(quick, request)
    assert bits(request) == bits(alone)
    later = quick.submit([*request.tokens, 9], greedy(3))
    finish(quick, later)
    same = plain.submit([*alone.tokens, 9], greedy(3))
    finish(plain, same)
    assert later.cached_tokens == same.cached_tokens
    assert bits(later) == bits(same)
    drafts = quick.metrics
    assert drafts.accepted_tokens / drafts.drafted_tokens == pytest.approx(right / 3, abs=0.2)


def test_the_mtp_block_sees_what_training_saw(net: Transformer) -> None:
    """The drafts are those of `mtp_logits` over the whole sequence."""
    from fathom.engine import LLM

    quick = serve(net, drafts=1, drafts_adaptive=False)
    request = quick.submit(prompt(20), greedy(9))
    agreed = 0
    while not request.finished:
        quick.step()
        if request.draft:
            best = LLM(net, None).mtp_logits(request.tokens)[-1].argmax()
            agreed += int(best) == request.draft[0]
    assert agreed >= 6  # of 7 or 8: values on the edge between two codes may fall to either side


def test_entries_that_are_known_stay(net: Transformer) -> None:
    """A replay begins with an empty window: what it computes first may not reach the slabs."""
    served = serve(net, checkpoint_spacing=0)
    first = served.submit(prompt(300), greedy(3))
    finish(served, first)
    drop_host(served)
    slab = next(iter(served.cache._device.values()))
    before = served.memory.slabs.data[slab].clone()
    again = served.submit(prompt(300), greedy(3))
    finish(served, again)
    assert 0 < again.cached_tokens < 256
    assert torch.equal(served.memory.slabs.data[slab], before)
    assert bits(again) == bits(first)


def test_prompts_in_chunks(net: Transformer) -> None:
    runs = []
    for invariant in (True, False):
        served = serve(net, batch_invariant=invariant)
        request = served.submit(prompt(134), greedy(5))
        finish(served, request)
        again = served.submit([*request.tokens, 5], greedy(3))
        finish(served, again)
        runs.append([*bits(request), *bits(again)])
    assert sum(a.token == b.token for a, b in zip(*runs, strict=True)) >= 6
    names = [serve(net, batch_invariant=flag).cache.root for flag in (True, False)]
    assert names[0] != names[1]  # nothing of one is taken for the other's


def test_exports_for_a_trainer(net: Transformer) -> None:
    for invariant in (True, False):
        served = serve(net, checkpoint_spacing=0, batch_invariant=invariant)
        request = served.submit(prompt(60), greedy(3), export=True)
        beside = served.submit(prompt(20, 1), greedy(3))
        finish(served, request, beside)
        parts = request.exports
        tokens = request.tokens[:-1]
        hidden = np.concatenate([p.hidden for p in parts])
        routing = np.concatenate([p.routing for p in parts], axis=1)
        selection = np.concatenate([p.selection for p in parts], axis=1)
        logits = served.runner.head(hidden)
        assert [int(row.argmax()) for row in logits[59:]] == [d.token for d in request.output]
        table = net.layers[0].ffn.gate.tid2eid  # type: ignore[union-attr]
        assert np.array_equal(routing[0], table[torch.tensor(tokens)].numpy())
        for t in (3, 40, len(tokens) - 1):
            picked = selection[1, t][selection[1, t] >= 0]
            assert len(picked) == min(4, (t + 1) // 4)
            assert np.all(np.diff(picked) > 0)
        assert np.all(selection[0] == -1)


def test_new_weights_in_place() -> None:
    net, other = stored_model(1), stored_model(2)
    served = serve(net)
    finish(served, served.submit(prompt(30), greedy(3)))
    net.load_state_dict(other.state_dict())
    served.update_weights()
    after, fresh = served.submit(prompt(30), greedy(3)), serve(other)
    same = fresh.submit(prompt(30), greedy(3))
    finish(served, after)
    finish(fresh, same)
    assert bits(after) == bits(same)


def test_a_stored_model_needs_no_transformer(net: Transformer) -> None:
    found = []
    for served in (serve(net), engine(StoredModel.of(net))):
        request = served.submit(prompt(30), greedy(4))
        finish(served, request)
        found.append(bits(request))
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="FP4 indexer keys"):
        engine(StoredModel.of(net), indexer="fp8")


def test_models_that_are_stored_otherwise() -> None:
    assert unstorable(model(quantized=False)) == "the model is not quantised"
    assert "bf16, not fp8" in str(unstorable(model()))
    net = stored_model()
    with torch.no_grad():
        net.layers[0].attn.wq_a.weight.add_(0.01)  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="wq_a"):
        StoredModel.of(net)

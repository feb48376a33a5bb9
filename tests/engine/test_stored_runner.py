"""The runner over stored formats, here over its operations' references: the engine's promises hold.

On a GPU the engine's own tests run with it; see the `device` of conftest.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine
from fathom.engine.kv_cache import SlabLayout
from fathom.engine.runner import Summarising
from fathom.engine.sampler import Wanted
from fathom.engine.scheduler import Budget
from fathom.engine.state_cache import SlotLayout
from fathom.engine.stored_runner import StoredRunner
from fathom.engine.stored_steps import Span, cut
from fathom.engine.torch_runner import TorchRunner
from fathom.errors import ConfigError
from fathom.kernels import registry, use_backend
from fathom.kernels.reference import stored as references
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
from tests.engine.test_speculative import Oracle, draft_errors, drafts_are_right
from tests.model.tiny import as_stored


@pytest.fixture(scope="module")
def net() -> Transformer:
    """One layer of each kind, and a block for drafts."""
    kinds = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 128)}
    return stored_model(num_nextn_predict_layers=1, **kinds)


def serve(net: Any, **settings: Any) -> Engine:
    with use_backend("triton"):
        made = engine(net, **settings)
    assert isinstance(made.runner, StoredRunner)
    return made


@pytest.fixture(autouse=True)
def _as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references decode a weight at each use: here once, as long as nobody writes to it."""

    def once(name: str) -> None:
        whole = getattr(references, name)
        kept: dict[object, tuple[torch.Tensor, ...]] = {}

        def call(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            key = (codes.data_ptr(), codes.shape, codes._version, scale._version)
            if key not in kept:
                kept[key] = (codes, scale, whole(codes, scale))
            return kept[key][2]

        monkeypatch.setattr(references, name, call)

    as_stored(monkeypatch)
    once("fp8_matrix")
    once("fp4_matrix")


@pytest.fixture
def to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare bits: row by row, as the CPU's matrix products add up in another order
    for other numbers of rows. It takes several times as long."""

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

    by_row("stored_linear", (0,))
    by_row("stored_moe", (0, 1))
    by_row("stream_head", (1,))
    by_row("mhc_boundary", (0,), ("y", "pairs", "post", "comb"))


@pytest.mark.parametrize("keys", ["fp4", "fp8"])
def test_the_torch_model_says_the_same(net: Transformer, keys: str) -> None:
    """Two sequences side by side, in pieces of one to eight rows, past a window of 128."""
    stored = serve(net, indexer=keys)
    with use_backend("reference"):
        plain = engine(net, indexer=keys)
    assert isinstance(plain.runner, TorchRunner)
    streams, logits = [], []
    for served in (stored, plain):
        for slot in range(2):
            served.memory.tables[slot, 0] = slot
        starts, own = [0, 0], []
        for sizes in [(1, 3), (1, 8), (6, 1), (8, 2)] * (9 if keys == "fp4" else 2):
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


@pytest.mark.usefixtures("to_the_bit")
def test_the_same_bits_in_every_batch_and_cut(net: Transformer) -> None:
    expected = None
    for most, beside, rows in ((512, 0, 8), (7, 2, 8), (33, 3, 8), (33, 3, 64), (512, 1, 20)):
        served = serve(net, budget=Budget(tokens=most, beside_streams=most), prompt_rows=rows)
        request = served.submit(prompt(40), sampled(5))
        others = [served.submit(prompt(3 + 4 * i, i), sampled(3)) for i in range(beside)]
        finish(served, request, *others)
        expected = expected or bits(request)
        assert bits(request) == expected


@pytest.mark.usefixtures("to_the_bit")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mtp_block_sees_what_training_saw(dtype: torch.dtype) -> None:
    net = stored_model(1, dtype, num_nextn_predict_layers=1)
    errors = draft_errors(serve(net, drafts=1, drafts_adaptive=False), net, length=40)
    assert drafts_are_right(errors, dtype), errors


@pytest.mark.parametrize("norm", ["enorm", "hnorm"])
def test_a_block_that_does_not_norm_is_found(
    net: Transformer, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(net, drafts=1, drafts_adaptive=False)
    whole = registry._kernels["stored_linear", "reference"]
    weight = getattr(served.runner._stored.mtp[0], norm)  # type: ignore[attr-defined]

    def without(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("norm") is weight:
            kwargs["norm"] = None
        return whole(*args, **kwargs)

    monkeypatch.setitem(registry._kernels, ("stored_linear", "reference"), without)
    errors = draft_errors(served, net, length=20)
    assert not drafts_are_right(errors, net.dtype), errors


def test_prompts_in_steps_of_64_rows(net: Transformer, tmp_path: Path) -> None:
    """The same bits as eight at a time, past windows and slabs; and either takes up the other's
    sessions, whose records do not know how large a slot is.
    """
    found, saved = [], []
    for rows in (8, 64):
        served = serve(net, prompt_rows=rows, disk=tmp_path, checkpoint_spacing=256)
        known = served.submit(prompt(70, rows), greedy(2))
        finish(served, known)
        saved.append((served.save_session(known), known))
        request = served.submit(prompt(134), greedy(2))
        finish(served, request)
        found.append(bits(request))
        served.close()
    assert found[0] == found[1]
    for rows, (name, known) in zip((64, 8), saved, strict=True):
        served = serve(net, prompt_rows=rows, disk=tmp_path)
        tokens = served.load_session(name)
        assert tokens == known.tokens
        later = served.submit([*tokens, 5], greedy(2))
        finish(served, later)
        assert later.cached_tokens >= 70
        assert len(bits(later)) == 2


def test_no_row_of_a_step_overwrites_what_another_reads() -> None:
    """Rows run side by side, so that none may write where any of them reads the rows before."""
    slabs = SlabLayout.of(stored_model().config, True, torch.float32)
    window = slabs.config.sliding_window
    for room in (8, 9, 64):
        layout = SlotLayout(slabs, room=room)
        for start in range(200, 600):
            written = range(start, start + room)
            for ring, read in (
                (layout.ring, range(start - window + 1, start)),  # by attention, afterwards
                (layout.tail, range(start - 7, start)),
                (layout.online, range(start - 1, start)),
            ):
                places = {p % ring for p in written}
                assert len(places) == room
                assert not places & {p % ring for p in read}


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize(
    ("slot", "start", "said"),
    [
        (0, None, "do not fit its"), (0, -1, "from position 0 on"), (99, 0, "no number 99"),
        (-1, 0, "no number -1"),
    ],
)  # fmt: skip
def test_a_piece_beyond_the_memory_is_refused_before_anything_is_written(
    net: Transformer, slot: int, start: int | None, said: str, invariant: bool
) -> None:
    served = serve(net, batch_invariant=invariant)
    memory = served.memory
    assert memory.tables.shape[0] < 99
    if start is None:
        start = memory.tables.shape[1] * 256 - 20
    before = memory.slabs.data.clone(), memory.slots.data.clone()
    good = Piece(slot=1, start=0, tokens=prompt(40, 0))
    bad = Piece(slot=slot, start=start, tokens=prompt(40, 1))
    batch = Batch.of([good, bad])
    with pytest.raises(ConfigError, match=said):
        served.runner.forward(batch)
    with pytest.raises(ConfigError, match=said):
        served.runner.draft(batch, np.zeros((80, 4, net.config.hidden_size), np.float32))
    assert torch.equal(before[0], memory.slabs.data)
    assert torch.equal(before[1], memory.slots.data)


def test_steps_are_as_full_as_can_be() -> None:
    pieces = [Piece(slot=i, start=7, tokens=list(range(n))) for i, n in enumerate((1, 1, 100, 30))]
    spans, row = [], 0
    for piece in pieces:
        spans.append(Span(piece, 0, len(piece.tokens), row))
        row += len(piece.tokens)
    for room, steps in ((8, 13), (64, 3)):
        made = cut(spans, room)
        assert len(made) == steps
        for step in made:
            assert 0 < sum(span.count for span in step) <= 64
            assert len({id(span.piece) for span in step}) == len(step)
            assert all(span.count <= room for span in step)
        for piece, whole in zip(pieces, spans, strict=True):
            own = [span for step in made for span in step if span.piece is piece]
            at = [place for span in own for place in range(span.at, span.at + span.count)]
            assert at == list(range(len(piece.tokens)))
            assert all(span.row == whole.row + span.at for span in own)


@pytest.mark.usefixtures("to_the_bit")
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


@pytest.mark.usefixtures("to_the_bit")
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


@pytest.mark.usefixtures("to_the_bit")
def test_a_stored_model_needs_no_transformer(net: Transformer) -> None:
    found = []
    for served in (serve(net), engine(StoredModel.of(net))):
        request = served.submit(prompt(30), greedy(4))
        finish(served, request)
        found.append(bits(request))
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="hidden_size is 192, no multiple of 128"):
        engine(StoredModel.of(stored_model(hidden_size=192)))


def test_fp8_index_keys(net: Transformer) -> None:
    """They take more room, give other bits, and prompts in chunks leave the same ones."""
    found, stored = [], []
    for keys, invariant in (("fp4", True), ("fp8", True), ("fp8", False)):
        served = serve(net, indexer=keys, batch_invariant=invariant)
        request = served.submit(prompt(50), greedy(3))
        finish(served, request)
        found.append(bits(request))
        again = served.submit([*request.tokens, 5], greedy(1))
        finish(served, again)
        assert again.cached_tokens == 52
        layout = served.memory.slabs.layout
        assert sum(layout.key_sizes) == {"fp4": 34, "fp8": 68}[keys]
        place = next(p for p in layout.layers if p.key_data >= 0)
        whole = served.memory.slabs.data[int(served.memory.tables[0, 0])]
        stored.append(whole[place.key_data : place.key_data + 12 * layout.key_sizes[0]])
    assert found[0] != found[1]
    # A value on the edge between two codes may fall to either side, and later tokens see it.
    assert (stored[1] != stored[2]).float().mean() < 0.3


def test_models_that_are_stored_otherwise() -> None:
    assert unstorable(model(quantized=False)) == "the model is not quantised"
    assert "bf16, not fp8" in str(unstorable(model()))
    net = stored_model()
    with torch.no_grad():
        net.layers[0].attn.wq_a.weight.add_(0.01)  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="wq_a"):
        StoredModel.of(net)


@pytest.mark.parametrize("drafts", [0, 2])
def test_only_rows_that_are_needed_leave_the_device(
    net: Transformer, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever draws, the device or the host, draws the same."""
    alike = ("greedy", greedy(9)), ("sampled", sampled(9)), ("warm", sampled(9, temperature=2.5))
    every = {"top_k": 10**6}  # nothing is left out, and the host draws
    found: dict[str, list[Any]] = {}
    left: dict[str, int] = {}
    for kind, more in (("device", {}), ("host", every), ("unsure", {})):
        if kind == "unsure":
            monkeypatch.setattr("fathom.engine.stored_runner.SURE", 1.0)
        served = serve(net, drafts=drafts, drafts_adaptive=False)
        download, rows = served.runner._download, []  # type: ignore[attr-defined]

        def watched(*values: torch.Tensor, download: Any = download, rows: Any = rows) -> Any:
            rows += [len(v) for v in values if v.shape[1] == net.config.vocab_size]
            return download(*values)

        served.runner._download = watched  # type: ignore[attr-defined]
        runs = [
            served.submit(prompt(30 + i), replace(params, **more if params.temperature else {}))
            for i, (_, params) in enumerate(alike)
        ]
        finish(served, *runs)
        found[kind], left[kind] = [bits(run) for run in runs], sum(rows)
    assert found["device"] == found["host"] == found["unsure"]
    assert left["device"] == 0
    assert left["host"] >= 2 * 9
    assert left["unsure"] == left["host"]


def test_logits_are_there_for_whoever_needs_them(net: Transformer) -> None:
    """Beside streams that need none: a mask's, a penalty's, alternatives, a narrowed choice."""
    settings: list[dict[str, Any]] = [
        {"top_p": 0.5}, {"min_p": 0.1}, {"top_logprobs": 2}, {"logit_bias": {7: 100.0}},
        {"frequency_penalty": 1.0},
    ]  # fmt: skip
    served = serve(net)
    plain = [served.submit(prompt(20, i), greedy(4)) for i in range(3)]
    shaped = [served.submit(prompt(20, i), sampled(4, **s)) for i, s in enumerate(settings)]
    finish(served, *plain, *shaped)
    for run, more in zip(shaped, settings, strict=True):
        alone = serve(net)
        same = alone.submit(run.prompt, sampled(4, **more))
        finish(alone, same)
        assert [d.token for d in same.output] == [d.token for d in run.output]
    assert all(len(d.top) == 2 for d in shaped[2].output)
    assert [d.token for d in shaped[3].output] == [7] * 4


def test_more_rows_than_a_step_holds(net: Transformer) -> None:
    """Each row gets what it wants, whatever part of the batch it is read with."""
    served = serve(net)
    served.memory.tables[0, 0] = 0
    served.runner.forward(Batch.of([Piece(slot=0, start=0, tokens=prompt(70))]))
    runner = served.runner
    assert isinstance(runner, Summarising)
    hidden, logits = served.runner.logits(list(range(70)))
    wanted = [Wanted(whole=n in (3, 4, 66), hidden=n == 2) for n in range(70)]
    found = runner.summarised(list(range(70)), wanted)
    assert found.hidden is not None
    assert found.summaries is not None
    assert np.array_equal(found.hidden, hidden)
    assert np.array_equal(found.summaries[:, 1], logits.argmax(axis=1))
    for number, row in enumerate(found.logits):
        assert (row is not None) == (number in (3, 4, 66))
        assert row is None or np.array_equal(row, logits[number])
    assert runner.summarised([1], [Wanted(whole=False)]).hidden is None

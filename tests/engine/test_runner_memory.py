"""What an engine plans for a GPU, with a card that is pretended and tensors without memory."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from fathom.checkpoint.synthetic import synthetic_checkpoint
from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine
from fathom.engine.kv_cache import SlabLayout
from fathom.engine.options import EngineConfig, MemoryPlan
from fathom.engine.runner import summarised
from fathom.engine.runner_memory import runner_parts, stored_bytes
from fathom.engine.sampler import Wanted
from fathom.engine.state_cache import SlotLayout
from fathom.engine.stored_fit import misfit
from fathom.engine.stored_steps import bounds
from fathom.errors import ConfigError
from fathom.model import Transformer
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredModel
from tests.launchless import meta_model, needs_triton

needs_triton()
FLASH = replace(
    ModelConfig.preset("flash"), num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1
)


def plan_of(model, config: EngineConfig, columns: int = 4097) -> MemoryPlan:
    slab = SlabLayout.of(model.config, True, torch.bfloat16)
    return MemoryPlan(
        slab=slab, slabs=4096, slot=SlotLayout(slab, room=64), slots=config.max_sequences,
        columns=columns, weights=sum(t.nbytes for t in model.state_dict().values()),
        runner=runner_parts(
            model, max_rows=config.max_rows,
            chunk_tokens=0 if config.batch_invariant else config.budget.tokens, columns=columns,
        ),
    )  # fmt: skip


def test_the_plan_holds_what_a_long_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(meta_model(FLASH, monkeypatch), EngineConfig())
    sizes = {part.label: part.size for part in plan.runner}
    (graphs,) = (size for label, size in sizes.items() if "graphs' pool (attention 128)" in label)
    assert graphs > 64 * 131 * 64 * 512 * 4  # partial results of HCA alone
    assert sum(sizes.values()) == plan.needed - plan.total
    assert not any("second copy" in label for label in sizes)
    assert f"{plan.needed:,}" in plan.lines()[-1]
    assert f"{plan.weights:,}" in plan.lines()[0]
    shorter = plan_of(meta_model(FLASH, monkeypatch), EngineConfig(), columns=17)
    assert shorter.needed < plan.needed - 18 * 10**8


def test_chunks_and_a_second_copy_are_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = meta_model(FLASH, monkeypatch)
    held = sum(t.nbytes for t in stored.state_dict().values())
    with torch.device("meta"):
        net = Transformer(FLASH, dtype=torch.bfloat16, quantized=True)
    assert stored_bytes(net) == held
    labels = [part.label for part in plan_of(net, EngineConfig(batch_invariant=False)).runner]
    assert any("second copy" in label for label in labels)


def test_too_little_memory_is_a_sentence_that_says_what_would_do(monkeypatch) -> None:
    plan = plan_of(meta_model(FLASH, monkeypatch), EngineConfig())
    plan.check(plan.needed)
    with pytest.raises(ConfigError, match="lower cache_tokens or max_sequences") as told:
        plan.check(plan.needed - 1)
    assert f"; cache_tokens={4095 * 256} would do" in str(told.value)
    assert "max_position_embeddings" in str(told.value)
    replace(plan, slabs=4095).check(plan.needed - 1)


def test_bounds_end_with_the_longest_context() -> None:
    assert bounds(2**20 + 256) == [4096, 16384, 65536, 262144, 1048576, 1048832]
    assert bounds(2304) == [2304]
    assert bounds(4096) == [4096]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden_size is 7232, no multiple of 128", {"hidden_size": 7232}),
        ("num_attention_heads is 96, no power of two", {"num_attention_heads": 96}),
        ("index_head_dim is 256, not within 32 to 128", {"index_head_dim": 256}),
        ("q_lora_rank is 1000, no multiple of 128", {"q_lora_rank": 1000}),
        ("index_topk is 2048", {"index_topk": 2048}),
        ("hc_mult is 8", {"hc_mult": 8}),
    ],
)
def test_a_model_that_does_not_fit_is_told_its_dimension(name: str, changes: dict) -> None:
    assert misfit(FLASH) is None
    assert name in str(misfit(replace(FLASH, **changes)))


def test_the_shipped_models_and_pro() -> None:
    assert misfit(ModelConfig.preset("flash")) is None
    assert misfit(ModelConfig.preset("nano")) is None
    assert misfit(ModelConfig.preset("pro")) is None


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_device_takes_what_was_planned() -> None:
    """At most: steps of one row and of 64 up to every bound, all their logits, and a long chunk."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = synthetic_model(replace(FLASH, n_routed_experts=32, max_position_embeddings=65_536))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    settings = EngineConfig(max_sequences=64, cache_tokens=262_144, batch_invariant=False)
    plan = MemoryPlan.of(settings, model)
    served = Engine(model, settings)
    served.memory.slabs.data.zero_()  # as entries that anything may be computed from
    runner = served.runner
    for bound in bounds(plan.columns * 256):
        for rows in (1, 64):
            pieces = [Piece(slot=slot, start=bound - 1, tokens=[2]) for slot in range(rows)]
            for _ in range(2):
                runner.forward(Batch.of(pieces))
                summarised(runner, list(range(rows)), [Wanted(whole=True)] * rows)
    runner.forward(Batch.of([Piece(slot=0, start=40_000, tokens=[2] * settings.budget.tokens)]))
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before[0]
    reserved = torch.cuda.max_memory_reserved() - before[1]  # beside what was free in its blocks
    found = [f"{used:>18,}  used at once", f"{reserved:>18,}  reserved anew"]
    shown = "\n".join([*plan.lines(), *found])
    sys.stdout.write(f"{shown}\n")
    assert max(used, reserved) <= plan.needed, shown
    assert used >= plan.total, shown


def synthetic_model(config: ModelConfig) -> StoredModel:
    return StoredModel.from_tensors(config, synthetic_checkpoint(config, seed=1, device="cuda"))

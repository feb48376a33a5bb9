from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fathom.errors import ConfigError, TrainError
from fathom.train.data import BatchLoader
from fathom.train.metrics import read_log
from fathom.train.pretrain import build_model, pretrain
from fathom.train.qat import official_formats
from fathom.train.recipe import Recipe
from fathom.train.schedule import DENSE, INDEXER, SPARSE
from fathom.train.state import latest_state, load_compact
from fathom.train.step import METRICS, LossWeights, training_step
from tests.train.small import SMALL

VOCAB = SMALL["vocab_size"]


def copies(seed, stage):
    """Eight random tokens, again and again: what follows is known from the ninth on."""
    rng = random.Random(seed)
    while True:
        pattern = [rng.randrange(3, VOCAB) for _ in range(8)]
        yield [0, *(pattern * 16)[:127]], [0.0] * 9 + [1.0] * 119


def noise(seed, stage):
    """Short random episodes, to exercise padding and documents cheaply."""
    rng = random.Random(seed)
    while True:
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(20, 128))]
        yield ids, [1.0] * len(ids)


def recipe(steps, *, tokens=1024, model=None, schedule=None, run=None):
    return Recipe.from_dict(
        {
            "model": {"preset": "micro", "dtype": "float32", "override": SMALL | (model or {})},
            "data": {"tokens": tokens, "seq_len": [128], "workers": 0},
            "optimizer": {"muon_lr": 0.02, "adamw_lr": 0.03},
            "schedule": schedule or {},
            "run": {"steps": steps, "log_every": 1, **(run or {})},
        }
    )


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiny matrices run many times slower on contended threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_small_model_learns_to_copy_through_every_stage(tmp_path):
    summary = pretrain(recipe(110), tmp_path, source=copies)
    rows = read_log(tmp_path / "log.jsonl")
    assert summary["finished"]
    assert len(rows) == 110
    assert rows[0]["loss"] > 2.5  # ln 20 = 3.0: nothing known
    assert {row["attention"] for row in rows} == {"dense", "indexer", "sparse"}
    assert rows[-1]["qat"]
    last = rows[-10:]
    assert sum(row["accuracy"] for row in last) / len(last) > 0.95
    assert not any(row["skipped"] for row in rows)
    # The indexer learns where attention goes as soon as it is asked to.
    kl = [row["indexer_kl"] for row in rows]
    assert all(k == 0 for k, row in zip(kl, rows, strict=True) if row["attention"] == "dense")
    assert kl[-1] > 0
    model = build_model(recipe(110), torch.device("cpu"))
    load_compact(model, tmp_path / "weights.safetensors")
    assert model.layers[1].ffn.gate.bias.abs().max() > 0  # balancing moved it
    ids, _ = next(copies(12345, 0))
    predicted = model(torch.tensor([ids])).argmax(-1)[0]
    right = sum(int(predicted[i]) == ids[i + 1] for i in range(8, 127))
    assert right / 119 > 0.9


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path):
    # Every stage lies on both sides of, or at, the interruption; MTP and padding take part.
    plan = recipe(
        10,
        tokens=256,
        model={"num_nextn_predict_layers": 1},
        schedule={"indexer_start": 0.3, "sparse_start": 0.5, "qat_start": 0.7},
    )
    pretrain(plan, tmp_path / "whole", source=noise)
    steps = iter(range(100))
    stopped = pretrain(plan, tmp_path / "parts", source=noise, leave_after=lambda: next(steps) >= 6)
    assert not stopped["finished"]
    assert stopped["step"] == 6
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    with pytest.raises(TrainError, match="--resume"):
        pretrain(plan, tmp_path / "parts", source=noise)
    assert pretrain(plan, tmp_path / "parts", source=noise, resume=True)["finished"]
    timing = ("elapsed", "tokens_per_second")
    whole, parts = (
        [
            {k: v for k, v in row.items() if k not in timing}
            for row in read_log(tmp_path / part / "log.jsonl")
        ]
        for part in ("whole", "parts")
    )
    assert whole == parts
    a, b = (latest_state(tmp_path / p / "state") / "state.safetensors" for p in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()


def test_a_time_budget_ends_a_run(tmp_path):
    plan = recipe(None, tokens=128, run={"minutes": 0.01})
    summary = pretrain(plan, tmp_path, source=noise)
    assert summary["finished"]
    assert summary["minutes"] > 0.009  # as of the last step, before the time was over
    assert json.loads((tmp_path / "recipe.json").read_text())["run"]["minutes"] == 0.01


def test_only_indexers_move_in_the_indexer_stage(tmp_path):
    plan = recipe(1, tokens=256, schedule={"indexer_start": 0.0, "sparse_start": 1.0})
    model = build_model(plan, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pretrain(plan, tmp_path, source=noise)
    after = build_model(plan, torch.device("cpu"))
    load_compact(after, tmp_path / "weights.safetensors")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved
    assert all(".indexer." in name for name in moved)


def test_the_indexer_stage_survives_gradients_of_zero(tmp_path):
    """Compiled blocks give zeros, not none; with momentum left, Muon would move everything."""

    def zero_gradients(model, batch, attention, weights, ranks):
        result = training_step(model, batch, attention, weights, ranks)
        result.total = result.total + sum(0.0 * p.sum() for p in model.parameters())
        return result

    before = recipe(2, tokens=256, schedule={"indexer_start": 1.0, "sparse_start": 1.0})
    pretrain(before, tmp_path, source=noise, step_function=zero_gradients)
    trained = build_model(before, torch.device("cpu"))
    load_compact(trained, tmp_path / "weights.safetensors")
    wanted = {name: p.detach().clone() for name, p in trained.named_parameters()}
    after = recipe(4, tokens=256, schedule={"indexer_start": 0.0, "sparse_start": 1.0})
    pretrain(after, tmp_path, resume=True, source=noise, step_function=zero_gradients)
    load_compact(trained, tmp_path / "weights.safetensors")
    for name, p in trained.named_parameters():
        assert (".indexer." in name) or torch.equal(p.detach(), wanted[name]), name


def test_attention_reads_everything_until_it_is_sparse(monkeypatch):
    plan = recipe(1, tokens=256)
    model = build_model(plan, torch.device("cpu"))
    loader = BatchLoader(noise, seed=1, tokens=256, workers=0, plan=lambda index: (0.0, 128))
    weights = LossWeights(mtp=0.3, balance=1e-4, indexer=1.0)
    seen, original = [], model.context

    def context(*args, dense, **kwargs):
        seen.append(dense)
        return original(*args, dense=dense, **kwargs)

    monkeypatch.setattr(model, "context", context)
    with loader:
        batch = next(loader)
        results = {a: training_step(model, batch, a, weights) for a in (DENSE, INDEXER, SPARSE)}
    assert seen == [True, True, False]
    metrics = {a: dict(zip(METRICS, r.metrics.tolist(), strict=True)) for a, r in results.items()}
    # Eight entries of up to 32: what is not picked changes the loss, a little.
    assert metrics[DENSE]["loss"] == metrics[INDEXER]["loss"] != metrics[SPARSE]["loss"]
    assert metrics[DENSE]["indexer_kl"] == 0 < metrics[INDEXER]["indexer_kl"]
    assert results[INDEXER].total.item() == pytest.approx(metrics[INDEXER]["indexer_kl"])


def test_official_formats_follow_the_released_files():
    model = build_model(recipe(1, model={"num_nextn_predict_layers": 1}), torch.device("cpu"))
    formats = official_formats(model)
    assert formats["layers.1.attn.wq_a"] == formats["layers.0.ffn.shared_experts.w2"] == "fp8"
    assert formats["layers.1.attn.indexer.wq_b"] == formats["mtp.0.e_proj"] == "fp8"
    assert formats["layers.1.ffn.experts"] == formats["mtp.0.ffn.experts"] == "fp4"
    assert not any("compressor" in n or "weights_proj" in n or "gate" in n for n in formats)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"run": {}, "data": {"tokens": 256, "seq_len": [128], "workers": 0}}, "needs an end"),
        ({"model": {"dtype": "int8"}, "run": {"steps": 1}}, "dtype must be"),
        ({"model": {"override": {"colour": 1}}, "run": {"steps": 1}}, "no field"),
    ],
)
def test_impossible_recipes_say_why(tmp_path, part, match):
    base = {"model": {"preset": "micro", "override": SMALL}}
    with pytest.raises(TrainError, match=match):
        pretrain(Recipe.from_dict(base | part), tmp_path, source=noise)


@pytest.mark.parametrize("out", ["/proc/no/run", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_named(out):
    with pytest.raises(TrainError, match=f"cannot write the run to {out}"):
        pretrain(recipe(1), Path(out), source=noise)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    with pytest.raises(ConfigError, match=device):
        pretrain(recipe(1), tmp_path, source=noise, device=device)


def test_a_run_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TrainError, match=r"no tokenizer\.json"):
        pretrain(recipe(1), tmp_path)

"""Data parallelism: two processes make the update that one makes with the whole batch."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.errors import TrainError
from fathom.train.data import Batch, BatchLoader
from fathom.train.metrics import MetricLog, read_log
from fathom.train.parallel import ALONE
from fathom.train.pretrain import Trainer, build_model, pretrain
from fathom.train.recipe import Recipe
from fathom.train.state import latest_state, load_compact
from tests.train.small import SMALL

ROOT = Path(__file__).parents[2]
STEPS = 6  # more, and on some processors a sum in another order has a router choose otherwise
PLAN = {
    "model": {
        "preset": "micro",
        "dtype": "float32",
        "override": {**SMALL, "num_nextn_predict_layers": 1},
    },
    "data": {"tokens": 1024, "seq_len": [256], "workers": 0},
    "optimizer": {"muon_lr": 0.01, "adamw_lr": 0.01},
    # Without QAT: rounding would turn a difference in the last bit into a visible one.
    "schedule": {"indexer_start": 0.4, "sparse_start": 0.6, "qat_start": 1.0},
    "run": {"steps": STEPS, "processes": 2, "log_every": 1, "seed": 3},
}


def lopsided(seed, stage):
    """Episodes of very different lengths and weights: the processes hold unequal parts."""
    rng = random.Random(seed)
    heavy = rng.random() < 0.5
    while True:
        length = rng.randint(150, 250) if heavy else rng.randint(5, 60)
        yield [rng.randrange(20) for _ in range(length)], [1.0 if heavy else 0.1] * length


# The test's own process never joins a group: this runs as each of the two.
MEMBER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from fathom.train.pretrain import pretrain
from fathom.train.recipe import Recipe
from tests.train.test_parallel import PLAN, lopsided

if __name__ == "__main__":
    out, leave = Path(sys.argv[1]), int(sys.argv[2])
    calls = iter(range(1000))
    print(json.dumps(pretrain(
        Recipe.from_dict(PLAN), out, device="cpu", source=lopsided, resume=True,
        leave_after=lambda: next(calls) >= leave,
    )))
"""


def run_two(tmp_path: Path, out: Path, leave: int = 1000) -> list[dict]:
    """Run PLAN in two processes, as torchrun would start them; their summaries."""
    script = tmp_path / "member.py"
    script.write_text(MEMBER.format(root=str(ROOT)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    members = [
        subprocess.Popen(
            [sys.executable, script, out, str(leave)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        texts = [member.communicate(timeout=250) for member in members]
    finally:
        for member in members:
            member.kill()
    assert [member.returncode for member in members] == [0, 0], texts
    return [json.loads(text.splitlines()[-1]) for text, _ in texts]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The whole run of two processes: its folder and their summaries."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "out", run_two(folder, folder / "out")


def whole_batches():
    """What both processes make, as one batch for each step."""
    loader = BatchLoader(lopsided, seed=3, tokens=512, workers=0, plan=lambda index: (0.0, 256))
    with loader:
        while True:
            a, b = next(loader), next(loader)
            yield Batch(
                index=b.index // 2,
                stage=a.stage,
                tokens=torch.cat((a.tokens, b.tokens)),
                documents=torch.cat((a.documents, b.documents)),
                weights=torch.cat((a.weights, b.weights)),
                episodes=a.episodes + b.episodes,
                dropped=0,
            )


@pytest.mark.timeout(300)
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, together):
    two, summaries = together
    assert [s["first"] for s in summaries] == [True, False]
    assert all(s["finished"] and s["tokens"] == STEPS * 1024 for s in summaries)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = Recipe.from_dict({**PLAN, "run": {**PLAN["run"], "processes": 1}})
    torch.manual_seed(3)
    model = build_model(alone, torch.device("cpu"))
    trainer = Trainer(alone, model, tmp_path / "one")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with MetricLog(tmp_path / "one.jsonl", every=1) as log:
        assert trainer.run(whole_batches(), log, lambda: False)  # pyright: ignore
    torch.set_num_threads(before)
    for one, both in zip(
        read_log(tmp_path / "one.jsonl"), read_log(two / "log.jsonl"), strict=True
    ):
        for name in ("loss", "accuracy", "mtp_loss", "indexer_kl", "imbalance", "used", "norm"):
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (one["step"], name)
    other = build_model(alone, torch.device("cpu"))
    load_compact(other, two / "weights.safetensors")
    for name, p in model.named_parameters():
        # There all streams are still equal: most of the true gradient is zero, and optimisers that
        # look at directions alone make full-sized updates out of the rounding that is left.
        if name.startswith("layers.0.hc_attn_"):
            continue
        moved = (p - start[name]).norm()
        difference = (p - other.state_dict()[name]).norm()
        assert difference <= 0.01 * moved + 1e-5, name


@pytest.mark.timeout(300)
def test_two_processes_stop_together_and_resume(tmp_path, together):
    whole, parts = together[0], tmp_path / "parts"
    stopped = run_two(tmp_path, parts, leave=5)
    assert [s["step"] for s in stopped] == [5, 5]
    assert not (parts / "weights.safetensors").exists()
    position = json.loads((latest_state(parts / "state") / "state.json").read_text())
    assert position["next_batch"] == 10  # two a step
    run_two(tmp_path, parts)
    a, b = ((p / "weights.safetensors").read_bytes() for p in (whole, parts))
    assert a == b


def test_alone_nothing_changes():
    gradient = torch.tensor([1.0, 2.0])
    ALONE.average([gradient])
    assert gradient.tolist() == [1.0, 2.0]
    assert ALONE.share(torch.tensor([0.0, 7.0])).tolist() == [1.0, 1.0]
    assert ALONE.decide(0.25, 1.0) == [0.25, 1.0]


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    with pytest.raises(TrainError, match="nproc-per-node 2"):
        pretrain(Recipe.from_dict(PLAN), tmp_path, source=lopsided)
    uneven = {**PLAN, "data": {**PLAN["data"], "tokens": 1023}}
    uneven["run"] = {**PLAN["run"], "processes": 1}
    plan = Recipe.from_dict(uneven)
    with pytest.raises(TrainError, match="do not fill a batch"):
        pretrain(plan, tmp_path, source=lopsided)

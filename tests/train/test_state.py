from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fathom.errors import TrainError
from fathom.train.optimizer import Optimizer
from fathom.train.state import (
    Position,
    export_compact,
    join_pieces,
    latest_state,
    load_compact,
    load_state,
    pieces,
    save_state,
)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("tid2eid", torch.randint(4, (16, 2)))


class Small(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.gate = Gate()
        self.big = nn.Linear(300, 300, bias=False)


def _trained(seed):
    torch.manual_seed(seed)
    model = Small()
    optimizer = Optimizer(model)
    optimizer.set_learning_rates(0.01, 0.01)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return model, optimizer


def test_a_state_comes_back_bit_for_bit(tmp_path):
    model, optimizer = _trained(1)
    position = Position(step=3, tokens=99, elapsed_seconds=1.5, next_batch=3, recipe={"a": [1]})
    path = save_state(tmp_path, model, optimizer, position)
    draw = torch.rand(3)
    other, other_optimizer = _trained(2)
    assert load_state(path, other, other_optimizer) == position
    assert torch.equal(torch.rand(3), draw)  # the generator went back too
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, other_optimizer.state()[name]), name


def test_the_newest_two_are_kept_and_a_partial_one_is_never_seen(tmp_path):
    model, optimizer = _trained(1)
    assert latest_state(tmp_path) is None
    for step in (5, 30, 200):
        save_state(tmp_path, model, optimizer, Position(step=step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000200"]
    (tmp_path / ".partial-00000900").mkdir()
    (tmp_path / "step-00000800").mkdir()  # as a crash between files would leave it
    assert latest_state(tmp_path) == tmp_path / "step-00000200"


def test_damage_and_foreign_models_are_reported(tmp_path):
    model, optimizer = _trained(1)
    path = save_state(tmp_path, model, optimizer, Position(step=1))
    other = Small(width=4)
    with pytest.raises(TrainError, match="does not fit"):
        load_state(path, other, Optimizer(other))
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainError, match=r"damaged|cannot read"):
        load_state(path, model, optimizer)
    with pytest.raises(TrainError, match="cannot read"):
        load_state(tmp_path / "absent", model, optimizer)


def test_pieces_are_small_and_join_again(tmp_path):
    model, optimizer = _trained(1)
    path = save_state(tmp_path / "state", model, optimizer, Position(step=1))
    parts = pieces(path, tmp_path / "parts", max_bytes=100_000)
    assert len(parts) > 5
    assert all(p.stat().st_size <= 100_000 for p in parts)
    joined = join_pieces(tmp_path / "parts", tmp_path / "joined")
    for file in path.iterdir():
        assert (joined / file.name).read_bytes() == file.read_bytes()
    assert load_state(joined, *_trained(3)).step == 1
    damaged = parts[0]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises(TrainError, match="damaged"):
        join_pieces(tmp_path / "parts", tmp_path / "again")
    damaged.unlink()
    with pytest.raises(TrainError, match="cannot join"):
        join_pieces(tmp_path / "parts", tmp_path / "again")


def test_damaged_pieces_leave_no_half_file(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a").write_bytes(bytes(range(250)))
    parts = pieces(tmp_path / "whole", tmp_path / "parts", max_bytes=100)
    parts[2].write_bytes(b"x")
    with pytest.raises(TrainError, match="damaged"):
        join_pieces(tmp_path / "parts", tmp_path / "joined")
    assert list((tmp_path / "joined").iterdir()) == []


@pytest.mark.parametrize(
    "table",
    [{"../out": []}, {"/tmp/out": []}, {"a": [{"name": "../b", "sha256": ""}]}, {"a": [1]}, [], 1],
)
def test_a_list_of_pieces_is_not_believed(tmp_path, table):
    (tmp_path / "parts").mkdir()
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "parts" / "pieces.json").write_text(json.dumps(table))
    with pytest.raises(TrainError, match="cannot join"):
        join_pieces(tmp_path / "parts", tmp_path / "joined")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["generators", "shape"])
def test_a_state_that_lacks_a_part_is_reported(tmp_path, damage):
    model, optimizer = _trained(1)
    path = save_state(tmp_path, model, optimizer, Position(step=1))
    saved = load_file(path / "state.safetensors")
    if damage == "generators":
        del saved["generator.cpu"]
    else:
        saved["balanced.gate.bias"] = saved["balanced.gate.bias"][:1].clone()
    save_file(saved, path / "state.safetensors")
    before = model.gate.bias.clone()
    with pytest.raises(TrainError, match="lacks"):
        load_state(path, model, optimizer)
    assert torch.equal(model.gate.bias, before)


def test_the_compact_export_keeps_small_tensors_exact(tmp_path):
    model, other = Small(), Small()
    export_compact(model, tmp_path / "out" / "weights.safetensors")
    load_compact(other, tmp_path / "out" / "weights.safetensors")
    assert torch.equal(model.gate.bias, other.gate.bias)
    assert torch.equal(model.gate.tid2eid, other.gate.tid2eid)
    assert torch.equal(model.embed.weight, other.embed.weight)
    assert torch.equal(model.big.weight.bfloat16().float(), other.big.weight)
    size = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert size < 300 * 300 * 2 + 5000
    with pytest.raises(TrainError, match="does not fit"):
        load_compact(Small(width=4), tmp_path / "out" / "weights.safetensors")


def test_the_position_is_plain_json(tmp_path):
    model, optimizer = _trained(1)
    path = save_state(tmp_path, model, optimizer, Position(step=7, recipe={"run": {"seed": 1}}))
    assert json.loads((path / "state.json").read_text())["step"] == 7

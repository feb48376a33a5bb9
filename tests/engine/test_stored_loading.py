"""From an official checkpoint's files to tokens without a Transformer, and on which devices."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fathom.checkpoint import load_model, load_stored, open_checkpoint
from fathom.checkpoint.tiny import tiny_config, write_tiny
from fathom.engine import llm as llm_module
from fathom.engine.engine import Engine
from fathom.engine.llm import LLM
from fathom.engine.stored_fit import misfit, refusal
from fathom.engine.stored_runner import StoredRunner
from fathom.errors import ConfigError
from fathom.kernels import device as devices
from fathom.kernels import use_backend
from fathom.model.stored import StoredModel
from tests.engine.helpers import (
    STORED,
    bits,
    engine,
    finish,
    greedy,
    prompt,
    sampled,
    stored_model,
)  # fmt: skip
from tests.model.tiny import as_stored

SIZES: dict[str, Any] = {
    **{k: v for k, v in STORED.items() if k not in ("expert_dtype", "quantized")},  # by its kind
    "vocab_size": 400,
    "num_nextn_predict_layers": 1,
    "eos_token_id": 399,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official checkpoint in two files: a hash layer, CSA, HCA, an MTP block, FP8 wo_a."""
    config = tiny_config("instruct", **SIZES)
    assert config.num_hash_layers == 1
    assert misfit(config) is None
    return write_tiny(tmp_path_factory.mktemp("official"), config=config, seed=5, files=2)


@pytest.fixture(scope="module")
def stored(folder: Path) -> StoredModel:
    return load_stored(folder, device="cpu", dtype=torch.float32)


def serve(net: Any, **settings: Any) -> Engine:
    with use_backend("triton"):
        made = engine(net, **settings)
    assert isinstance(made.runner, StoredRunner)
    return made


def test_an_engine_serves_the_files_as_it_serves_a_transformer(folder: Path, stored) -> None:
    """Tokens and log-probabilities bit for bit, with drafts and without."""
    net = load_model(folder)
    told = []
    for model in (stored, net):
        for drafts in (0, 2):
            served = serve(model, drafts=drafts)
            requests = [
                served.submit(prompt(21), greedy(9)),
                served.submit(prompt(5, 1), sampled(7)),
            ]
            finish(served, *requests)
            told.append([bits(request) for request in requests])
    assert told[0] == told[2]
    assert told[1] == told[3]
    assert [[d.token for d in r] for r in told[0]] == [[d.token for d in r] for r in told[1]]


def test_no_second_copy_of_the_weights_is_kept(stored) -> None:
    served = serve(stored)
    assert served.runner._stored is stored
    there = {t.untyped_storage().data_ptr() for t in stored.state_dict().values()}
    used = {t.untyped_storage().data_ptr() for t in served.runner._stored.state_dict().values()}
    assert used == there


def test_logits_of_a_prompt_without_an_engine(folder: Path, stored, monkeypatch) -> None:
    """In chunks of 40 as in one, and near what the torch model says in its own order of sums."""
    as_stored(monkeypatch)
    ids = prompt(150)
    mine, other = LLM(stored, None), LLM(load_model(folder), None)
    whole, drafted = mine.logits(ids), mine.mtp_logits(ids)
    expected, expected_drafted = other.logits(ids), other.mtp_logits(ids)
    for found, wanted in ((whole, expected), (drafted, expected_drafted)):
        assert found.shape == wanted.shape
        assert found.dtype == torch.float32
        error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.median() < 1e-4, error
    monkeypatch.setattr("fathom.model.stored_prompt.CHUNK", 40)
    for found, wanted in ((mine.logits(ids), whole), (mine.mtp_logits(ids), drafted)):
        error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.median() < 1e-4, error
    with pytest.raises(ConfigError, match="no MTP block"):
        LLM(load_stored(write_without_mtp(folder.parent / "plain"), device="cpu"), None).mtp_logits(
            ids
        )


def write_without_mtp(folder: Path) -> Path:
    config = tiny_config("instruct", **{**SIZES, "num_nextn_predict_layers": 0})
    return write_tiny(folder, config=config)


CUDA = torch.device("cuda")


def a_card(name: str, major: int, minor: int, shared: int) -> dict[str, Any]:
    facts = {"name": name, "major": major, "minor": minor}
    return {**facts, "shared_memory_per_block_optin": shared}


H100 = a_card("NVIDIA H100", 9, 0, 232448)
CARDS = {
    "V100": (a_card("V100", 7, 0, 98304), "7.0"),
    "A100": (a_card("A100", 8, 0, 166912), "8.0"),
    "4090": (a_card("4090", 8, 9, 101376), "8.9"),
    "5090": (a_card("5090", 12, 0, 101376), "101,376 bytes of shared memory"),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Let torch believe in a card; nothing runs on it."""

    def card(facts: dict[str, Any], cuda: str | None = "12.9", hip: str | None = None) -> None:
        def properties(_: object) -> SimpleNamespace:
            return SimpleNamespace(**facts)

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _: (facts["major"], facts["minor"])
        )
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

    return card


def test_what_the_kernels_need_of_a_card(pretend, monkeypatch) -> None:
    pretend(H100)
    assert devices.unfit(CUDA) is None
    for dtype in (torch.float32, torch.float16):
        assert f"activations are {dtype}" in str(devices.unfit(CUDA, dtype))
    for facts, said in CARDS.values():
        pretend(facts)
        assert said in str(devices.unfit(CUDA))
        assert facts["name"] in str(devices.unfit(CUDA))
    pretend(H100, cuda=None, hip="6.4")
    assert "ROCm" in str(devices.unfit(CUDA))
    pretend(H100)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in str(devices.unfit(CUDA))


def test_scaled_fp8_products_only_where_torch_has_them(pretend) -> None:
    for facts, cuda, expected in [
        (H100, "12.9", True), (H100, "13.0", True), (H100, "12.8", False), (H100, "12.10", True),
        (H100, "11.8", False), (H100, None, False), (CARDS["A100"][0], "12.9", False),
    ]:  # fmt: skip
        pretend(facts, cuda)
        assert devices.multiplies_scaled_fp8(CUDA) is expected
    assert not devices.multiplies_scaled_fp8(torch.device("cpu"))


@pytest.mark.parametrize("card", CARDS)
def test_other_cards_fall_back_with_a_sentence(
    folder: Path, stored, pretend, caplog: pytest.LogCaptureFixture, card: str
) -> None:
    pretend(CARDS[card][0])
    checkpoint = open_checkpoint(folder)
    with caplog.at_level(logging.WARNING):
        chosen = llm_module._read_as_stored(checkpoint, CUDA, torch.bfloat16, None)
    assert not chosen
    assert "compute capability 9.0" in caplog.text
    assert CARDS[card][1] in caplog.text
    net = stored_model(dtype=torch.bfloat16)
    assert CARDS[card][1] in str(refusal(CUDA, net))
    assert refusal(torch.device("cpu"), net) is None


def test_a_stored_model_asked_for_elsewhere_is_an_error(folder, pretend) -> None:
    model = load_stored(folder, device="cpu")
    memory = engine(model).memory
    pretend(CARDS["A100"][0])
    somewhere: Any = SimpleNamespace(device=CUDA)
    with pytest.raises(ConfigError, match=r"A100 has compute capability 8.0; .*H100, H200"):
        StoredRunner(somewhere, model, memory, 8)


def test_which_checkpoints_are_read_as_stored(folder, pretend, tmp_path, caplog) -> None:
    pretend(H100)
    checkpoint = open_checkpoint(folder)
    asked = llm_module._read_as_stored
    assert asked(checkpoint, CUDA, torch.bfloat16, None)
    assert asked(checkpoint, CUDA, torch.bfloat16, True)
    assert not asked(checkpoint, CUDA, torch.bfloat16, False)
    assert not asked(checkpoint, torch.device("cpu"), torch.bfloat16, None)
    assert not asked(checkpoint, CUDA, torch.float32, None)
    config = tiny_config("base", **SIZES)
    base = open_checkpoint(write_tiny(tmp_path / "base", config=config))
    with caplog.at_level(logging.WARNING):
        assert not asked(base, CUDA, torch.bfloat16, None)
    assert "wanted F8_E8M0" in caplog.text


def test_a_transformer_in_float32_keeps_the_torch_runner_on_a_gpu(pretend) -> None:
    pretend(H100)
    assert "float32" in str(refusal(CUDA, stored_model(dtype=torch.float32)))
    assert refusal(CUDA, stored_model(dtype=torch.bfloat16)) is None
    assert "bfloat16, not fp8" in str(refusal(CUDA, stored_model(), "bfloat16"))


def test_loading_a_folder_on_a_gpu_gives_the_stored_model(folder, stored, pretend, monkeypatch):
    """`fathom.load` as for a card; only the place that the bytes go to is the CPU here."""
    pretend(H100)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    places = []

    def read(source: Any, *, device: torch.device, dtype: torch.dtype) -> StoredModel:
        places.append(device)
        return load_stored(source, device="cpu", dtype=dtype)

    monkeypatch.setattr(llm_module, "load_stored", read)
    loaded = llm_module.load(folder, device="cuda")
    assert places == [CUDA]
    assert isinstance(loaded.model, StoredModel)
    assert loaded.model.dtype == torch.bfloat16
    assert np.isfinite(loaded.logits([3, 4, 5]).numpy()).all()

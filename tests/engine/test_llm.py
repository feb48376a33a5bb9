"""LLM: prompts in, tokens with their probabilities out, and earlier prompts remembered."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fathom
from fathom.chat import Tokenizer
from fathom.checkpoint import load_model
from fathom.checkpoint.tiny import write_tiny
from fathom.engine import LLM
from fathom.engine.checkpoints import MIN_SHARED
from fathom.engine.engine import EngineConfig
from fathom.engine.sampler import Sampler, SamplingParams
from fathom.engine.scheduler import Budget
from fathom.errors import CheckpointError, ConfigError, GenerationError, TokenizerError
from fathom.kernels import use_backend
from fathom.model import Transformer
from tests.model.tiny import RANDOM_CONFIG, random_model

CONTEXT = 400
CONFIG = replace(RANDOM_CONFIG, vocab_size=400, max_position_embeddings=CONTEXT)
NO_EOS = replace(CONFIG, eos_token_id=399)  # a token that the prompts below do not lead to


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(1, NO_EOS)


@pytest.fixture
def llm(model: Transformer) -> LLM:
    return LLM(model, None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn from, and a few more words"] * 3, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "small")


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, 390), k=tokens)


class TestLogits:
    def test_equal_the_model(self, llm: LLM) -> None:
        ids = prompt_of(140)
        with torch.no_grad():
            expected = llm.model(torch.tensor([ids]))[0]
        found = llm.logits(ids)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_ignore_earlier_prompts(self, llm: LLM) -> None:
        ids = prompt_of(60)
        before = llm.logits(ids)
        llm.generate(ids, max_tokens=3)
        assert torch.equal(llm.logits(ids), before)

    def test_mtp(self, llm: LLM) -> None:
        ids = prompt_of(20)
        with torch.no_grad():
            expected = llm.model.mtp_logits(torch.tensor([ids]))[0]
        assert expected.shape == (19, CONFIG.vocab_size)
        assert torch.equal(llm.mtp_logits(ids), expected)

    def test_mtp_needs_two_tokens_and_a_block(self, llm: LLM) -> None:
        with pytest.raises(GenerationError, match="two tokens"):
            llm.mtp_logits([5])
        without = LLM(random_model(1, replace(CONFIG, num_nextn_predict_layers=0)), None)
        with pytest.raises(ConfigError, match="no MTP block"):
            without.mtp_logits([5, 6])


class TestGenerate:
    def test_greedy_takes_the_best_token_each_time(self, llm: LLM) -> None:
        prompt = prompt_of(120, seed=3)
        done = llm.generate(prompt, max_tokens=20, temperature=0)
        assert done.finish_reason == "length"
        assert done.prompt_tokens == 120
        assert len(done.token_ids) == 20
        rows = llm.logits(prompt + done.token_ids)[119:-1]
        assert rows.argmax(-1).tolist() == done.token_ids

    def test_greedy_needs_no_seed(self, llm: LLM) -> None:
        runs = {tuple(llm.generate([7, 8], 12, 0.0, seed=s).token_ids) for s in (None, 1, 2)}
        assert len(runs) == 1

    @pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 3}, {"top_p": 0.7}])
    def test_logprobs_are_the_models_own(self, llm: LLM, settings: dict[str, float]) -> None:
        prompt = prompt_of(30)
        done = llm.generate(prompt, max_tokens=10, **{"seed": 1, **settings})  # type: ignore[arg-type]
        rows = llm.logits(prompt + done.token_ids)[29:-1].log_softmax(-1)
        for row, token, logprob in zip(rows, done.token_ids, done.logprobs, strict=True):
            assert logprob == pytest.approx(float(row[token]), abs=1e-4)

    def test_a_seed_repeats_a_run(self, llm: LLM) -> None:
        runs = [llm.generate([7, 8], 24, seed=s).token_ids for s in (5, 5, 6)]
        assert runs[0] == runs[1] != runs[2]

    def test_without_seed_runs_differ(self, llm: LLM) -> None:
        runs = {tuple(llm.generate([7, 8], 24, temperature=5.0).token_ids) for _ in range(2)}
        assert len(runs) == 2

    def test_a_tiny_top_p_or_temperature_is_greedy(self, llm: LLM) -> None:
        greedy = llm.generate([7, 8], 12, temperature=0).token_ids
        assert llm.generate([7, 8], 12, top_p=1e-6).token_ids == greedy
        for temperature in (1e-6, 1e-42):
            assert llm.generate([7, 8], 12, temperature=temperature).token_ids == greedy

    def test_stops_at_a_stop_token(self, llm: LLM) -> None:
        whole = llm.generate([7, 8], 12, temperature=0)
        stop = whole.token_ids[5]
        end = whole.token_ids.index(stop) + 1
        done = llm.generate([7, 8], 12, temperature=0, stop_token_ids=[stop])
        assert done.token_ids == whole.token_ids[:end]
        assert done.logprobs == whole.logprobs[:end]
        assert done.finish_reason == "stop"

    def test_stops_at_the_end_of_the_sequence(self, llm: LLM) -> None:
        first = llm.generate([7, 8], 1, temperature=0).token_ids
        ending = random_model(1, replace(CONFIG, eos_token_id=first[0]))
        done = LLM(ending, None).generate([7, 8], 12, temperature=0)
        assert done.token_ids == first
        assert done.finish_reason == "stop"

    def test_no_tokens_asked_for(self, llm: LLM) -> None:
        done = llm.generate([7, 8], max_tokens=0)
        assert (done.text, done.token_ids, done.logprobs) == ("", [], [])
        assert done.finish_reason == "length"

    def test_ends_where_the_context_ends(self, llm: LLM) -> None:
        done = llm.generate(prompt_of(CONTEXT - 3), max_tokens=50, temperature=0)
        assert len(done.token_ids) == 3
        assert done.finish_reason == "length"
        assert llm.generate(prompt_of(CONTEXT), max_tokens=50).token_ids == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": -0.1}, "temperature"),
            ({"temperature": math.nan}, "temperature"),
            ({"temperature": math.inf}, "temperature"),
            ({"top_p": 0.0}, "top_p"),
            ({"top_p": 1.1}, "top_p"),
            ({"top_p": math.nan}, "top_p"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**64}, "seed"),
        ],
    )
    def test_impossible_values(self, llm: LLM, settings: dict[str, float], message: str) -> None:
        with pytest.raises(GenerationError, match=message):
            llm.generate([7, 8], **settings)  # type: ignore[arg-type]
        with pytest.raises(GenerationError, match=message):
            llm.stream([7, 8], **settings)  # type: ignore[arg-type]  # at once, not when iterated

    @pytest.mark.parametrize("call", ["generate", "stream", "logits", "mtp_logits"])
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([], "empty"),
            ([3] * (CONTEXT + 1), "401 tokens"),
            ([3, 400], "400 is not a token id"),
            ([-1, 3], "-1 is not a token id"),
            ([3, True], "True is not a token id"),
            ([3, 4.0], "4.0 is not a token id"),
        ],
    )
    def test_bad_prompts(self, llm: LLM, call: str, ids: list[int], message: str) -> None:
        with pytest.raises(GenerationError, match=message):
            getattr(llm, call)(ids)

    def test_text_without_tokenizer(self, llm: LLM) -> None:
        for prompt in ("some words", ""):
            with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
                llm.generate(prompt)

    def test_an_empty_text(self, model: Transformer, tokenizer: Tokenizer) -> None:
        with pytest.raises(GenerationError, match="empty"):
            LLM(model, tokenizer).generate("")

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_damaged_weights(self, temperature: float) -> None:
        damaged = random_model(1, CONFIG)
        with torch.no_grad():
            damaged.norm.weight.fill_(math.nan)
        with pytest.raises(GenerationError, match="not finite"):
            LLM(damaged, None).generate([7, 8], temperature=temperature)


class TestText:
    def test_a_text_prompt_is_its_tokens(self, model: Transformer, tokenizer: Tokenizer) -> None:
        llm = LLM(model, tokenizer)
        ids = tokenizer.encode("some words", special=True)
        done = llm.generate("some words", 12, temperature=0)
        assert done.prompt_tokens == len(ids)
        assert done == replace(llm.generate(ids, 12, temperature=0), cached_tokens=0)

    def test_the_stop_token_has_no_text(self, model: Transformer, tokenizer: Tokenizer) -> None:
        llm = LLM(model, tokenizer)
        whole = llm.generate("some words", 12, temperature=0)
        stop = whole.token_ids[-1]
        end = whole.token_ids.index(stop)
        done = llm.generate("some words", 12, temperature=0, stop_token_ids=[stop])
        assert done.token_ids[-1] == stop
        assert done.text == tokenizer.decode(done.token_ids[:end])

    def test_without_tokenizer_there_is_none(self, llm: LLM) -> None:
        assert llm.generate([7, 8], 5, temperature=0).text == ""
        with pytest.raises(TokenizerError):
            _ = llm.tokenizer


class TestStream:
    def test_equals_generate(self, model: Transformer, tokenizer: Tokenizer) -> None:
        llm = LLM(model, tokenizer)
        done = llm.generate([7, 8, 9], 20, seed=4)
        run = llm.stream([7, 8, 9], 20, seed=4)
        pieces = list(run)
        assert [p.token_id for p in pieces] == done.token_ids
        assert [p.logprob for p in pieces] == done.logprobs
        assert "".join(p.text for p in pieces) == done.text
        assert (run.finish_reason, run.prompt_tokens) == (done.finish_reason, 3)

    def test_computes_nothing_before_it_is_iterated(self, llm: LLM) -> None:
        run = llm.stream([7, 8], 5, temperature=0)
        assert llm.engine.metrics.computed_tokens == 0
        next(run)
        # The prompt; the token is fed when the next one is asked for.
        assert llm.engine.metrics.computed_tokens == 2

    @pytest.mark.parametrize("taken", [1, 2, 6])
    def test_closed_early_it_leaves_a_sound_prefix(
        self, model: Transformer, llm: LLM, taken: int
    ) -> None:
        prompt = prompt_of(10)
        run = llm.stream(prompt, 20, temperature=0)
        begun = [next(run).token_id for _ in range(taken)]
        del run
        later = llm.generate(prompt + begun + [11], 8, temperature=0)
        assert later.cached_tokens == 10 + taken - 1
        cold = LLM(model, None).generate(prompt + begun + [11], 8, temperature=0)
        assert later.token_ids == cold.token_ids

    def test_a_step_that_fails_leaves_no_broken_prefix(
        self, model: Transformer, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when the user interrupts: some layers have taken the token in, others have not."""
        prompt = prompt_of(10)
        with use_backend("reference"):
            run = llm.stream(prompt, 20, temperature=0)
            begun = [next(run).token_id for _ in range(3)]
            with monkeypatch.context() as broken:
                broken.setattr(model.layers[2], "forward", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    next(run)
        later = llm.generate(prompt + begun + [11], 8, temperature=0)
        cold = LLM(model, None).generate(prompt + begun + [11], 8, temperature=0)
        assert later.token_ids == cold.token_ids
        assert later.logprobs == pytest.approx(cold.logprobs, abs=1e-4)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class TestPrefixes:
    @pytest.mark.parametrize("length", [3, 40, 126, 129])
    def test_a_continued_conversation_costs_only_its_end(
        self, model: Transformer, llm: LLM, length: int
    ) -> None:
        prompt = prompt_of(length)
        first = llm.generate(prompt, 6, temperature=0)
        assert first.cached_tokens == 0
        second = prompt + first.token_ids + prompt_of(5, seed=1)
        warm = llm.generate(second, 12, temperature=0)
        cold = LLM(model, None).generate(second, 12, temperature=0)
        assert warm.cached_tokens == length + 5  # the last token has not been fed yet
        assert warm.token_ids == cold.token_ids
        assert warm.logprobs == pytest.approx(cold.logprobs, abs=1e-4)

    def test_a_shared_opening_is_stored_once_seen_twice(self, model: Transformer, llm: LLM) -> None:
        opening = prompt_of(MIN_SHARED + 5)
        prompts = [opening + prompt_of(9, seed) for seed in (1, 2, 3)]
        warm = [llm.generate(p, 8, temperature=0) for p in prompts]
        assert [w.cached_tokens for w in warm] == [0, 0, len(opening)]
        for prompt, found in zip(prompts, warm, strict=True):
            cold = LLM(model, None).generate(prompt, 8, temperature=0)
            assert found.token_ids == cold.token_ids

    def test_continuing_twice_from_one_point(self, model: Transformer, llm: LLM) -> None:
        prompt = prompt_of(50)
        llm.generate(prompt, 1, temperature=0)
        for seed in (1, 2, 1):
            longer = prompt + prompt_of(7, seed)
            warm = llm.generate(longer, 8, temperature=0)
            assert warm.cached_tokens >= 50
            cold = LLM(model, None).generate(longer, 8, temperature=0)
            assert warm.token_ids == cold.token_ids

    def test_long_prompts_go_in_chunks(self, model: Transformer, llm: LLM) -> None:
        whole = llm.generate(prompt_of(150), 8, temperature=0)
        config = EngineConfig(budget=Budget(tokens=40))
        cut = LLM(model, None, engine=config).generate(prompt_of(150), 8, temperature=0)
        assert cut == whole


class TestSampler:
    LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def shares(self, draws: int = 4000, **settings: float) -> torch.Tensor:
        sampler = Sampler(SamplingParams(seed=0, **settings))  # type: ignore[arg-type]
        tokens = torch.tensor([sampler.pick(self.LOGITS.numpy()).token for _ in range(draws)])
        return tokens.bincount(minlength=4) / draws

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_draws_follow_the_probabilities(self, temperature: float) -> None:
        expected = (self.LOGITS / temperature).softmax(-1)
        assert float((self.shares(temperature=temperature) - expected).abs().max()) < 0.03

    def test_top_p_keeps_the_smallest_set_of_that_mass(self) -> None:
        expected = self.LOGITS[:2].softmax(-1)
        shares = self.shares(top_p=0.85)
        assert shares[2:].tolist() == [0, 0]
        assert float((shares[:2] - expected).abs().max()) < 0.03


class TestLoad:
    def test_a_folder(self, folder: Path) -> None:
        llm = fathom.load(folder)
        assert llm.name == "small"
        assert llm.model.dtype == torch.float32
        assert llm.model.quantized  # the checkpoint was made for it
        with torch.no_grad():
            expected = load_model(folder)(torch.tensor([[3, 4, 5]]))[0]
        assert torch.equal(llm.logits([3, 4, 5]), expected)
        assert fathom.load(str(folder / "config.json")).name == "small"

    def test_arithmetic_can_be_chosen(self, folder: Path) -> None:
        llm = fathom.load(folder, dtype=torch.bfloat16, quantized=False)
        assert (llm.model.dtype, llm.model.quantized) == (torch.bfloat16, False)
        assert llm.logits([3, 4]).dtype == torch.float32

    def test_a_folder_without_tokenizer(self, folder: Path) -> None:
        llm = fathom.load(folder)
        assert len(llm.generate([3, 4], 4, temperature=0).token_ids) <= 4
        with pytest.raises(TokenizerError, match=r"small has no tokenizer\.json"):
            llm.generate("text")

    def test_unknown_names(self, tmp_path: Path) -> None:
        for name in ("no-such-model", tmp_path / "missing"):
            with pytest.raises(ConfigError, match="no folder"):
                fathom.load(name)

    @pytest.mark.parametrize("preset", ["flash", "pro", "micro"])
    def test_presets_without_weights(self, preset: str) -> None:
        with pytest.raises(ConfigError, match=f"{preset} is a known configuration"):
            fathom.load(preset)

    def test_a_folder_without_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            fathom.load(tmp_path)

    def test_a_checkpoint_without_its_weights(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "torn")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError):
            fathom.load(folder)

    def test_a_file_that_belongs_to_no_checkpoint(self, folder: Path) -> None:
        (folder / "notes").write_text("x")
        with pytest.raises(ConfigError, match="notes is no file of a checkpoint"):
            fathom.load(folder / "notes")

    def test_an_unusable_dtype(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="dtype"):
            fathom.load(folder, dtype=torch.float16)

    @pytest.mark.parametrize(
        ("device", "says"), [("cuda:99", "there is no device cuda:99"), ("gpu", "names no device")]
    )
    def test_a_device_that_is_not_there(self, folder: Path, device: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            fathom.load(folder, device=device)

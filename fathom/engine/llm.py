"""Load a model and generate text with it: the simple engine, one request at a time.

    llm = fathom.load("nano")
    print(llm.generate("Once", max_tokens=20).text)

Reading order: load -> LLM.stream -> _pieces -> _prefill -> _decode.

Paper: none (inference interface).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from fathom.chat import Tokenizer
from fathom.chat.generation import TokenMask
from fathom.checkpoint import load_model
from fathom.engine.prefixes import PrefixStore
from fathom.engine.sampler import Sampler, SamplingParams
from fathom.errors import ConfigError, GenerationError, TokenizerError
from fathom.model.cache import Cache
from fathom.model.config import PRESETS
from fathom.model.decode import decode_step
from fathom.model.transformer import Transformer

SHIPPED = Path(__file__).resolve().parent.parent / "assets"  # models that come with the package
PREFILL_CHUNK = 1024  # tokens per forward pass, which bounds the memory of a long prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPiece:
    """One generated token. `text` is empty while a character is incomplete or without tokenizer."""

    text: str
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a prompt was completed with.

    `token_ids` includes the stop token, `text` does not. finish_reason: "stop" or "length".
    `cached_tokens` of the `prompt_tokens` were not computed again.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    prompt_tokens: int
    cached_tokens: int


def load(
    path_or_preset: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantized: bool | None = None,
) -> LLM:
    """Load a checkpoint folder, or a shipped model by name ("nano").

    dtype: arithmetic of activations, torch.float32 or torch.bfloat16 (default: float32 on the CPU,
    bfloat16 elsewhere). quantized: True performs every quantisation step of the official path,
    False none, None does what the checkpoint was made for. A folder without tokenizer.json loads
    too; only text needs one. Raises CheckpointError, ConfigError or UnsupportedModelError.
    """
    folder = _folder(path_or_preset)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load_model(folder, dtype=dtype, quantized=quantized, device=device)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return LLM(model, Tokenizer.load(folder) if has_tokenizer else None, name=folder.name)


def _folder(path_or_preset: str | Path) -> Path:
    folder = Path(path_or_preset)
    if folder.exists():
        return folder if folder.is_dir() else folder.parent
    name = str(path_or_preset)
    if (SHIPPED / name / "config.json").is_file():
        return SHIPPED / name
    if name in PRESETS:
        raise ConfigError(
            f"{name} is a known configuration, but its weights do not come with fathom: give the "
            "folder that holds its config.json and safetensors files"
        )
    raise ConfigError(f"no folder {name!r}, and no shipped model of that name (there is: nano)")


class LLM:
    """A model, its tokenizer (or None) and the caches of recent prompts. Not safe for threads."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None, name: str = "model"
    ) -> None:
        self.model = model.eval()
        self.config = model.config
        self.name = name
        self._tokenizer = tokenizer
        self._prefixes = PrefixStore()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError when the checkpoint came without one."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self.name} has no tokenizer.json: pass token ids instead of text, or add it"
            )
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position of one prefill without any cache: float32 [tokens, vocab].

        Raises GenerationError for an empty or too long list, or ids outside the vocabulary.
        """
        return self.model(self._tensor(self._check(token_ids)))[0].cpu()

    @torch.inference_mode()
    def mtp_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The MTP block's logits, float32 [tokens - 1, vocab]; row p reads p + 1, predicts p + 2.

        Raises GenerationError for fewer than two ids, ConfigError for a model without MTP block.
        """
        ids = self._check(token_ids)
        if len(ids) < 2:
            raise GenerationError("mtp_logits needs at least two tokens")
        return self.model.mtp_logits(self._tensor(ids))[0].cpu()

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        """Complete a prompt: text (special tokens in it are recognised) or token ids.

        Stops at the end-of-sentence token or one of stop_token_ids. Raises GenerationError for
        impossible values or a prompt longer than the context, TokenizerError for text without
        tokenizer.
        """
        run = self._start(prompt, max_tokens, temperature, top_p, seed, stop_token_ids)
        pieces = list(run)
        return Completion(
            text="".join(p.text for p in pieces),
            token_ids=[p.token_id for p in pieces],
            finish_reason=run.finish_reason,
            logprobs=[p.logprob for p in pieces],
            prompt_tokens=run.prompt_tokens,
            cached_tokens=run.cached_tokens,
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        *,
        top_k: int = 0,
        top_logprobs: int = 0,
        mask: TokenMask | None = None,
    ) -> Generation:
        """As `generate`, as an iterator of TokenPiece; its attributes say how it ended.

        `top_k` keeps only that many tokens (0: all), `top_logprobs` adds the most probable ones to
        every piece, and `mask` says before each token which ones are allowed.
        """
        run = self._start(
            prompt, max_tokens, temperature, top_p, seed, stop_token_ids, top_k, top_logprobs
        )
        run.use_mask(mask)
        return run

    def _start(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop_token_ids: Sequence[int],
        top_k: int = 0,
        top_logprobs: int = 0,
    ) -> Generation:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, special=True)
        ids = self._check(prompt)
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
            stop_token_ids=(self.config.eos_token_id, *stop_token_ids),
        )
        room = self.config.max_position_embeddings - len(ids)
        return Generation(self, ids, replace(params, max_tokens=min(params.max_tokens, room)))

    def _check(self, token_ids: Sequence[int]) -> list[int]:
        ids = list(token_ids)
        if not ids:
            raise GenerationError("the prompt is empty: give at least one token")
        if len(ids) > self.config.max_position_embeddings:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens, the model's context "
                f"{self.config.max_position_embeddings}: shorten it"
            )
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.config.vocab_size:
                raise GenerationError(
                    f"{i!r} is not a token id of this model (0 .. {self.config.vocab_size - 1})"
                )
        return ids

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.model.embed.weight.device)


@dataclass(slots=True)
class _Progress:
    cached_tokens: int = 0
    finish_reason: str = "length"
    mask: TokenMask | None = None


class Generation:
    """One running request: iterate over it for its pieces.

    Dropping it early stops it; what it computed stays available to later prompts.
    """

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self.prompt_tokens = len(prompt)
        self._progress = _Progress()
        # Not a method: it would refer back to this object, and end only at the next collection.
        self._pieces = _pieces(llm, prompt, params, self._progress)

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt were not computed again; known once it has begun."""
        return self._progress.cached_tokens

    def use_mask(self, mask: TokenMask | None) -> None:
        """Ask `mask` before every token; to be said before the first one is drawn."""
        self._progress.mask = mask

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop" or "length"."""
        return self._progress.finish_reason

    def __iter__(self) -> Iterator[TokenPiece]:
        return self._pieces

    def __next__(self) -> TokenPiece:
        return next(self._pieces)


def _pieces(
    llm: LLM, prompt: list[int], params: SamplingParams, progress: _Progress
) -> Iterator[TokenPiece]:
    if params.max_tokens == 0:
        return
    sampler, tokenizer = Sampler(params), llm._tokenizer
    decoder = tokenizer.incremental_decoder() if tokenizer is not None else None
    progress.cached_tokens, cache, logits = _prefill(llm, prompt)
    done = list(prompt)  # what the cache holds
    whole = True  # False while a step is under way: some layers have a token that others lack
    try:
        for _ in range(params.max_tokens):
            token, logprob, top = sampler.pick(logits, progress.mask)
            if token in params.stop_token_ids:
                progress.finish_reason = "stop"
                text = decoder.flush() if decoder is not None else ""
                yield TokenPiece(text=text, token_id=token, logprob=logprob, top_logprobs=top)
                return
            text = decoder.push(token) if decoder is not None else ""
            yield TokenPiece(text=text, token_id=token, logprob=logprob, top_logprobs=top)
            whole = False
            logits = _decode(llm, token, cache)
            done.append(token)
            whole = True
    finally:  # also when the consumer stops early
        if whole:
            llm._prefixes.add(done, cache)


@torch.inference_mode()
def _prefill(llm: LLM, prompt: list[int]) -> tuple[int, Cache, torch.Tensor]:
    """How much of the prompt was known, the cache after it, the logits [vocab] of what follows."""
    start, cache = llm._prefixes.longest(prompt)
    if cache is None:
        cache = llm.model.new_cache()
    shared = llm._prefixes.shared(prompt)
    stops = sorted({*range(start, len(prompt), PREFILL_CHUNK), shared, len(prompt)})
    streams = None
    for begin, end in pairwise(stops):
        if end <= start:
            continue
        streams = llm.model.streams(llm._tensor(prompt[max(begin, start) : end]), cache)
        if end == shared:
            llm._prefixes.add(prompt[:end], cache)
    assert streams is not None
    if len(prompt) - start > 1:
        llm._prefixes.add(prompt, cache)
    return start, cache, _last_logits(llm, streams)


@torch.inference_mode()
def _decode(llm: LLM, token: int, cache: Cache) -> torch.Tensor:
    """Feed one token; the logits [vocab] of the next."""
    return decode_step(llm._tensor([token]), llm.model, cache)


def _last_logits(llm: LLM, streams: torch.Tensor) -> torch.Tensor:
    """streams: [batch, seq, streams, hidden]. Returns the last position's logits [vocab]."""
    return llm.model.head(llm.model.hidden(streams[:, -1:]))[0, -1]

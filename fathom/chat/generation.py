"""What a server asks of an engine for one completion, and what comes back token by token.

The types lie here, below both, so that an engine needs to know nothing of servers and a server
nothing of torch.

Paper: none (inference interface).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from fathom.chat.tokenizer import Tokenizer


class TokenMask(Protocol):
    """Says which tokens may come next; one object per completion, used from one thread at a time.

    An engine asks `allowed` before it draws a token and tells the drawn one to `accept`. A mask may
    have an attribute `rules`, text that is the same for masks that enforce the same: a completion
    that was interrupted then goes on for who asks for it with another mask of these rules.
    """

    def allowed(self) -> bytes | None:
        """One bit per token id, lowest bit first, or None while everything is allowed."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that was drawn."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What else changes the choice of tokens, besides temperature and top_p; by default nothing.

    top_k keeps that many of the most probable tokens (0: all), min_p those at least that fraction
    as probable as the best one. repetition_penalty divides the logits of tokens that occurred,
    prompt included; frequency_penalty (per occurrence) and presence_penalty (once) are subtracted
    for those in the output. logit_bias is added per token id.
    """

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])

    def changes(self) -> dict[str, Any]:
        """The values that are not the default, by name."""
        plain = Shaping()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(plain, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One completion to make.

    `prompt` holds token ids; `text` the same prompt as text, for engines that take only that.
    `logprobs` says that log-probabilities are looked at, for engines that give them only when
    asked; `top_logprobs` asks for that many alternatives per token as well.
    """

    prompt: Sequence[int]
    text: str = ""
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    shaping: Shaping = field(default_factory=Shaping)
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    mask: TokenMask | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The prompt has been read; `cached_tokens` of it were known already."""

    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One generated token, its text as far as it is complete, and its log-probability.

    `token_id` is None where an engine gives text only; such text may hold spelled markup. The text
    of the stop token is empty. `top` holds (token id, log-probability), the most probable first.
    """

    token_id: int | None
    text: str
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEnd:
    """Why a completion ended, "stop" or "length", and what it cost.

    The counts are those of the engine where it knows better than its caller, else None.
    """

    finish_reason: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


Output = Prefilled | TokenOutput | GenerationEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a server must know of the engine behind it.

    `masks`: it obeys `GenerationRequest.mask`, `shaping`: its `shaping`. `logprobs`: it gives
    log-probabilities.
    """

    name: str
    context_tokens: int
    masks: bool = True
    logprobs: bool = True
    shaping: bool = True
    extra: dict[str, object] = field(default_factory=dict[str, object])


class Backend(Protocol):
    """An engine as a server sees it. Closing the generator cancels the work at once."""

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None where prompts go out as text."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """At most one `Prefilled`, then a `TokenOutput` for every token, then a `GenerationEnd`.

        Raises GenerationError for what cannot be served and BackendError for trouble of its own.
        """
        ...

    async def aclose(self) -> None:
        """Release everything; running completions end."""
        ...

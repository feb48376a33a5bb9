"""A generation as its caller sees it: pieces of text, one a token, while the engine works on it.

Paper: none (inference interface).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fathom.engine.request import Request
from fathom.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from fathom.engine.llm import LLM


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


class Generation:
    """One running request: iterate over it for its pieces.

    Dropping it early stops it; what it computed stays available to later prompts.
    """

    def __init__(
        self, llm: LLM, prompt: list[int], params: SamplingParams, options: dict[str, Any]
    ) -> None:
        self.prompt_tokens = len(prompt)
        self._started = _Started(llm, prompt, params, options)
        # Not a method: it would refer back to this object, and end only at the next collection.
        self._pieces = _pieces(self._started)

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt were not computed again; known once it has begun."""
        request = self._started.request
        return request.cached_tokens if request is not None else 0

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop" or "length"."""
        request = self._started.request
        return (request.finish_reason if request is not None else None) or "length"

    def begin(self) -> None:
        """Let the engine work on it from now on, together with others; iterating does so too."""
        self._started.begin()

    def complete(self) -> Completion:
        """The rest of it at once, as a Completion."""
        pieces = list(self)
        return Completion(
            text="".join(p.text for p in pieces),
            token_ids=[p.token_id for p in pieces],
            finish_reason=self.finish_reason,
            logprobs=[p.logprob for p in pieces],
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )

    def close(self) -> None:
        """Stop it now."""
        self._pieces.close()
        self._started.end()

    def __iter__(self) -> Iterator[TokenPiece]:
        return self._pieces

    def __next__(self) -> TokenPiece:
        return next(self._pieces)


class _Started:
    """A request that is submitted when it is first needed."""

    def __init__(
        self, llm: LLM, prompt: list[int], params: SamplingParams, options: dict[str, Any]
    ) -> None:
        self.llm, self.prompt, self.params, self.options = llm, prompt, params, options
        self.request: Request | None = None

    def begin(self) -> Request:
        if self.request is None:
            self.request = self.llm.engine.submit(self.prompt, self.params, **self.options)
        return self.request

    def end(self) -> None:
        if self.request is None:
            return
        self.llm.engine.forget(self.request)

    def __del__(self) -> None:
        if self.request is not None and not self.request.finished:
            self.llm.engine.forget(self.request, wait=False)


def _pieces(started: _Started) -> Generator[TokenPiece, None, None]:
    request, engine = started.begin(), started.llm.engine
    tokenizer, stops = started.llm._tokenizer, started.params.stop_token_ids
    decoder = tokenizer.incremental_decoder() if tokenizer is not None else None
    shown = 0
    try:
        while True:
            while shown == len(request.output) and not request.finished:
                engine.run_once(request)
            if shown == len(request.output):
                break
            drawn = request.output[shown]
            shown += 1
            text = ""
            if decoder is not None:
                text = decoder.flush() if drawn.token in stops else decoder.push(drawn.token)
            yield TokenPiece(
                text=text, token_id=drawn.token, logprob=drawn.logprob, top_logprobs=drawn.top
            )
        if request.error is not None:
            raise request.error
    finally:  # also when the consumer stops early
        started.end()

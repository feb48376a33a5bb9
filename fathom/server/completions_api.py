"""Plain completions: a prompt as text or token ids goes to the model as it is.

Special tokens in a text prompt are recognised: this is the one API that shows the model directly,
and what a gateway to this server uses. `return_token_ids` and `return_tokens_as_token_ids` work as
they do with vLLM.

Paper: none (API conventions).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from fathom.chat.protocol import BOS, SPECIAL_TOKENS
from fathom.chat.requests.common import read_shaping, warn_unknown
from fathom.chat.requests.fields import Fields
from fathom.chat.stops import StopFinder
from fathom.server.backend import Backend, GenerationRequest, Prefilled, Shaping, TokenOutput
from fathom.server.bounds import check_biases, check_stops, off_loop
from fathom.server.problems import Problem, as_problem, error_body
from fathom.server.render import (
    dumps,
    finite,
    merged,
    new_id,
    openai_usage,
    side_by_side,
    to_bytes,
)
from fathom.server.service import NO_LOGPROBS, Service
from fathom.server.turn import Account

_MOST_TOKENS = 393_216
_IGNORED = ("user", "add_special_tokens")  # said elsewhere, or the same either way


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRequest:
    """A request for plain completions."""

    model: str | None
    prompts: list[list[int]]
    texts: list[str]
    max_tokens: int
    temperature: float
    top_p: float
    shaping: Shaping
    seed: int | None
    choices: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    keep_special: bool
    token_ids: bool
    tokens_as_ids: bool
    notices: tuple[str, ...]


async def read_completions(service: Service, body: Mapping[str, Any]) -> RawRequest:
    """Read a body. Raises RequestError or Problem."""
    fields = Fields(body)
    size = getattr(body, "size", 0)
    texts, prompts = await off_loop(size, _read_prompts, service, fields)
    limits = service.settings.limits
    room = min(service.check_length(len(prompt), "prompt") for prompt in prompts)
    wanted = fields.integer("max_tokens", 0, _MOST_TOKENS)
    options = fields.object("stream_options")
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else (fields.items("stop") or [])
    if len(stops) > limits.stop_strings or not all(isinstance(s, str) for s in stops):
        fields.fail("stop", f"must be a text or at most {limits.stop_strings} texts")
    stop_ids = fields.items("stop_token_ids") or []
    if not all(_is_id(i) for i in stop_ids):
        fields.fail("stop_token_ids", "must hold token ids")
    choices = fields.integer("n", 1, limits.choices) or 1
    if choices * len(prompts) > limits.choices:
        fields.fail("prompt", f"{choices * len(prompts)} completions; at most {limits.choices}")
    keep = fields.boolean("skip_special_tokens")
    check_stops(stops, limits)
    logprobs = fields.integer("logprobs", 0, 20)
    shaping = read_shaping(fields)
    check_biases(shaping.logit_bias, service.backend.tokenizer)
    notices = list(service.without_effect(shaping))
    if logprobs is not None and not service.backend.info.logprobs:
        logprobs = None
        notices.append(NO_LOGPROBS)
    echo = fields.boolean("echo") or False
    if echo and logprobs is not None:
        notices.append("there are no logprobs of the prompt: only those of the reply are computed")
    raw = RawRequest(
        model=fields.text("model"),
        prompts=prompts,
        texts=texts,
        max_tokens=min(16 if wanted is None else wanted, room, limits.max_tokens),
        temperature=_or(fields.number("temperature", 0, 2), 1.0),
        top_p=_or(fields.number("top_p", 0, 1, above=True), 1.0),
        shaping=shaping,
        seed=fields.integer("seed", 0, 2**63 - 1),
        choices=choices,
        stop=tuple(s for s in stops if s),
        stop_token_ids=tuple(cast("list[int]", stop_ids)),
        logprobs=logprobs,
        echo=echo,
        stream=fields.boolean("stream") or False,
        include_usage=bool(options and options.boolean("include_usage")),
        keep_special=keep is False,
        token_ids=fields.boolean("return_token_ids") or False,
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids") or False,
        notices=(),
    )
    fields.ignore(_IGNORED)
    warn_unknown(fields, notices)
    return replace(raw, notices=tuple(notices))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _read_prompts(service: Service, fields: Fields) -> tuple[list[str], list[list[int]]]:
    tokenizer = service.backend.tokenizer
    value: Any = fields.take("prompt")
    suffix = fields.text("suffix")
    # Sizes first: looking at every item of a long list takes a while.
    most = service.settings.limits.choices
    for item in [value, *(value[:most] if _is_list(value) else [])]:
        if _is_list(item):
            service.check_length(len(item), "prompt")
        elif isinstance(item, str) and tokenizer is not None:
            service.check_length(len(item) // tokenizer.longest_token, "prompt")
    if isinstance(value, list) and value and all(_is_id(i) for i in cast("list[Any]", value)):
        value = [value]
    items: list[Any] = (
        [value] if isinstance(value, str) else (value if isinstance(value, list) else [])
    )
    if not items:
        fields.fail("prompt", "must be a text, a list of texts, or token ids")
    if tokenizer is None:
        raise Problem(400, "this gateway has no tokenizer: ask its upstream for completions",
                      code="no_tokenizer", param="prompt")  # fmt: skip
    if len(items) > most:
        fields.fail("prompt", f"{len(items)} prompts; at most {most} are allowed")
    texts: list[str] = []
    prompts: list[list[int]] = []
    for item in items:
        if isinstance(item, str):
            text = item
            if suffix is not None:
                t = SPECIAL_TOKENS
                text = f"{t['fim_begin']}{item}{t['fim_hole']}{suffix}{t['fim_end']}"
            text = text if text.startswith(BOS) else BOS + text
            ids = tokenizer.encode(text, special=True)
        elif isinstance(item, list) and item and all(_is_id(i) for i in cast("list[Any]", item)):
            ids = cast("list[int]", item)
            if max(ids) >= tokenizer.vocab_size:
                fields.fail("prompt", f"{max(ids)} is not a token of this model")
            text = tokenizer.decode(ids)
        else:
            fields.fail("prompt", "must be a text, a list of texts, or token ids")
        texts.append(text)
        prompts.append(ids)
    return texts, prompts


class RawTurn:
    """One plain completion; `account` as for a `Turn`."""

    def __init__(
        self,
        backend: Backend,
        request: GenerationRequest,
        raw: RawRequest,
        watch: Callable[[Any], Any],
    ) -> None:
        self.account = Account(prompt_tokens=len(request.prompt))
        self.prompt = request.prompt
        self.offset = 0  # in the text of the choice, of the next token that is told
        self._backend = backend
        self._request = request
        self._watch = watch
        self._keep_special = raw.keep_special
        self._stops = StopFinder(raw.stop) if raw.stop else None

    async def outputs(self) -> AsyncGenerator[tuple[str, list[TokenOutput]], None]:
        """Text to show, with the tokens that came meanwhile; the last may be only text."""
        reason, tokenizer = "stop", self._backend.tokenizer
        special = tokenizer.special_ids if tokenizer is not None else frozenset[int]()
        async with self._watch(self), aclosing(self._backend.generate(self._request)) as outputs:
            async for output in outputs:
                if isinstance(output, TokenOutput):
                    self.account.completion_tokens += 1
                    text = output.text
                    if output.token_id in special and not self._keep_special and tokenizer:
                        text = text.removesuffix(tokenizer.decode([output.token_id]))
                    yield self._shown(text), [output]
                    if self.account.stop_string is not None:
                        break
                elif isinstance(output, Prefilled):
                    self.account.prompt_tokens = output.prompt_tokens
                    self.account.cached_tokens = output.cached_tokens
                else:
                    reason = output.finish_reason
            if self.account.stop_string is None and reason == "length":
                self.account.finish_reason = "length"
        yield self._stops.flush() if self._stops is not None else "", []

    def _shown(self, text: str) -> str:
        if self._stops is None:
            return text
        shown = self._stops.push(text)
        self.account.stop_string = self._stops.found
        return shown


class CompletionsWriter:
    """Writes the completions of one request."""

    def __init__(self, service: Service, raw: RawRequest, owner: str) -> None:
        self.id = new_id("cmpl-")
        self._raw = raw
        self._tokenizer = service.backend.tokenizer
        self._created = int(time.time())
        self._model = raw.model or service.backend.info.name
        self._turns = [
            RawTurn(
                service.backend,
                GenerationRequest(
                    prompt=prompt,
                    text=text,
                    max_tokens=raw.max_tokens,
                    temperature=raw.temperature,
                    top_p=raw.top_p,
                    shaping=raw.shaping,
                    seed=None if raw.seed is None else (raw.seed + at) % 2**63,
                    stop_token_ids=raw.stop_token_ids,
                    logprobs=raw.logprobs is not None,
                    top_logprobs=raw.logprobs or 0,
                ),
                raw,
                service.watch(owner),
            )
            for prompt, text in zip(raw.prompts, raw.texts, strict=True)
            for at in range(raw.choices)
        ]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """All choices as they come, then usage and the end mark."""
        sources = [self._choice_stream(at, turn) for at, turn in enumerate(self._turns)]
        source = sources[0] if len(sources) == 1 else merged(sources)
        async with aclosing(source):
            async for data in source:
                yield data
        tail = ""
        if self._raw.include_usage:
            tail = self._event({"choices": [], "usage": self._usage()})
        yield to_bytes(tail + "data: [DONE]\n\n")

    async def complete(self) -> dict[str, Any]:
        """All choices as one object."""

        async def run(at: int, turn: RawTurn) -> dict[str, Any]:
            text, tokens = "", list[TokenOutput]()
            async with aclosing(turn.outputs()) as outputs:
                async for shown, new in outputs:
                    text += shown
                    tokens += new
            choice = self._choice(at, turn, text, tokens, first=True)
            return choice | {"finish_reason": turn.account.finish_reason}

        choices = await side_by_side(run(at, turn) for at, turn in enumerate(self._turns))
        return self._head() | {
            "choices": choices,
            "usage": self._usage(),
        }

    def fail(self, error: Exception) -> bytes:
        """The event that ends a stream in trouble."""
        return to_bytes(f"data: {dumps(error_body(as_problem(error), 'openai', self.id))}\n\n")

    def _usage(self) -> dict[str, Any]:
        return openai_usage([turn.account for turn in self._turns], self._raw.choices)

    async def _choice_stream(self, at: int, turn: RawTurn) -> AsyncGenerator[bytes, None]:
        first = True
        async with aclosing(turn.outputs()) as outputs:
            async for text, tokens in outputs:
                if text or tokens:
                    choice = self._choice(at, turn, text, tokens, first=first)
                    yield to_bytes(self._event({"choices": [choice]}))
                    first = False
        end = {
            "index": at,
            "text": "",
            "logprobs": None,
            "finish_reason": turn.account.finish_reason,
        }
        yield to_bytes(self._event({"choices": [end]}))

    def _choice(
        self, at: int, turn: RawTurn, text: str, tokens: list[TokenOutput], *, first: bool
    ) -> dict[str, Any]:
        raw = self._raw
        if raw.echo and first:
            shown = raw.texts[at // raw.choices].removeprefix(BOS)
            text, turn.offset = shown + text, len(shown)
        choice: dict[str, Any] = {
            "index": at,
            "text": text,
            "logprobs": self._logprobs(turn, tokens) if raw.logprobs is not None else None,
            "finish_reason": None,
        }
        if raw.token_ids:
            choice["token_ids"] = [t.token_id for t in tokens]
            if first:
                choice["prompt_token_ids"] = list(turn.prompt)
        return choice

    def _logprobs(self, turn: RawTurn, tokens: list[TokenOutput]) -> dict[str, Any]:
        offsets = list[int]()
        for token in tokens:
            offsets.append(turn.offset)
            turn.offset += len(token.text)
        return {
            "tokens": [self._name(t.token_id, t.text) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [
                {self._name(i, ""): finite(logprob) for i, logprob in t.top} for t in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int | None, text: str) -> str:
        if token is None:
            return text
        if self._raw.tokens_as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token])

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }

    def _event(self, body: dict[str, Any]) -> str:
        return f"data: {dumps(self._head() | body)}\n\n"

"""What the renderers of all APIs have in common: JSON for events, usage, and the side report.

Paper: none (API conventions).
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Protocol, TypeVar

from starlette.responses import Response

from fathom.chat import Event, ToolCall
from fathom.chat.tokenizer import Tokenizer
from fathom.server.turn import Account, TokenRecord, Turn

T = TypeVar("T")

_RAW = secrets.token_hex(16)  # stands for raw JSON until it is put in; nobody else can know it


class Renderer(Protocol):
    """Writes one completion as the events of an API's stream."""

    def feed(self, events: list[Event], turn: Turn) -> str:
        """The text of some more events; the first call also begins the message."""
        ...

    def finish(self, turn: Turn) -> str:
        """The end of the message."""
        ...


def text_json(text: str) -> str:
    """`text` as a JSON string; many times faster than the general encoder."""
    return encode_basestring(text)


@dataclass(frozen=True, slots=True)
class RawJson:
    """A value that is JSON text already, and goes out as it is.

    A model's arguments are JSON but not always what Python can hold: numbers of any length and
    beyond any float.
    """

    text: str


def dumps(value: Any) -> str:
    """Compact JSON that keeps non-ASCII characters; `RawJson` in it is put in as it is.

    Raises ValueError for an infinity, which JSON does not have.
    """
    raw: list[str] = []

    def stand_in(item: Any) -> str:
        if not isinstance(item, RawJson):
            raise TypeError(f"{type(item).__name__} is not JSON")
        raw.append(item.text)
        return _RAW

    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=stand_in
    )
    if not raw:
        return text
    first, *rest = text.split(f'"{_RAW}"')
    return first + "".join(a + b for a, b in zip(raw, rest, strict=True))


def to_bytes(text: str) -> bytes:
    """UTF-8; lone surrogates, which only a client's own text can bring, become question marks."""
    return text.encode("utf-8", "replace")


class Json(Response):
    """A JSON response, whatever its strings hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_bytes(dumps(content))


def new_id(prefix: str) -> str:
    """An identifier that nobody can guess: calls and responses are found again by it."""
    return f"{prefix}{secrets.token_hex(12)}"


def openai_usage(accounts: list[Account], choices: int | None = None) -> dict[str, Any]:
    """Token counts as Chat Completions states them, with the cache fields of DeepSeek.

    A prompt counts once for its choices: `choices` accounts after another share one (None: all).
    """
    size = choices or len(accounts)
    shared = [accounts[at : at + size] for at in range(0, len(accounts), size)]
    prompt = sum(max(account.prompt_tokens for account in group) for group in shared)
    cached = sum(max(account.cached_tokens for account in group) for group in shared)
    completion = sum(account.completion_tokens for account in accounts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(account.reasoning_tokens for account in accounts)
        },
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def custom_input(call: ToolCall) -> str:
    """The text for a custom tool, which the model writes as the one argument `input`."""
    # Only a string matters; Python refuses to convert very long numbers.
    given = json.loads(call.arguments, parse_int=float)
    text = given.get("input") if given else ""
    return text if isinstance(text, str) else call.arguments


def side_report(accounts: list[Account]) -> dict[str, Any] | None:
    """What a reply cannot say in the API's own words: calls withheld, irregular markup.

    None when everything was regular.
    """
    withheld = [
        {
            "name": call.name,
            "arguments": call.arguments,
            "partial": call.partial,
            "repaired": call.repaired,
        }
        for account in accounts
        for call in account.withheld
    ]
    repaired = [c.id for account in accounts for c in account.calls if c.repaired]
    diagnostics = [
        {"code": note.code, "text": note.text}
        for account in accounts
        for note in account.diagnostics
    ]
    report = {
        "withheld_calls": withheld,
        "repaired_calls": repaired,
        "diagnostics": diagnostics,
    }
    report = {name: value for name, value in report.items() if value}
    return report or None


def logprob_entry(tokenizer: Tokenizer | None, record: TokenRecord, top: int) -> dict[str, Any]:
    """A token's log-probability with `top` alternatives, in OpenAI's shape."""
    found = [_logprob(tokenizer, token, logprob) for token, logprob in record.top[:top]]
    return _logprob(tokenizer, record.token_id, record.logprob) | {"top_logprobs": found}


def finite(logprob: float) -> float:
    """JSON has no infinity and no NaN, which stand for a token that cannot come: almost none."""
    return logprob if -9999.0 < logprob < math.inf else -9999.0


def _logprob(tokenizer: Tokenizer | None, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token) if tokenizer is not None else b""
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


async def render_events(turn: Turn, renderer: Renderer) -> AsyncGenerator[bytes, None]:
    """The bytes of one completion's stream."""
    async with aclosing(turn.events()) as events:
        async for batch in events:
            text = renderer.feed(batch, turn)
            if text:
                yield to_bytes(text)
    yield to_bytes(renderer.finish(turn))


async def exhaust_all(turns: list[Turn]) -> None:
    """Run completions side by side to their ends; the first error ends all of them."""
    await side_by_side(_exhaust(turn) for turn in turns)


async def side_by_side(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, which run at the same time; the first error ends all of them."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def merged(sources: list[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """What several streams yield, in the order in which it comes."""
    queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(maxsize=2 * len(sources))

    async def run(source: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(source):
                async for data in source:
                    await queue.put(data)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(run(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        await _cancel(tasks)


async def _exhaust(turn: Turn) -> None:
    async with aclosing(turn.events()) as events:
        async for _ in events:
            pass


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

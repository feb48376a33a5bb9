"""One completion while it happens: tokens in, events of the reply out, and its account at the end.

    backend tokens -> StreamParser -> what the client may see -> renderer of an API

Here it is decided what reaches a client: stop strings, which calls are delivered, when the reply
ends and why. Renderers only write it down.

Paper: §5.1.1 (a turn is reasoning, content and tool calls).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Literal

from fathom.chat import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    Diagnosed,
    Diagnostic,
    Event,
    ReasoningDelta,
    Tokenizer,
    ToolCall,
)
from fathom.chat.protocol import THINK
from fathom.chat.requests import PromptRequest
from fathom.server.backend import Backend, GenerationEnd, GenerationRequest, Prefilled, TokenOutput

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Account:
    """What a completion said and cost; complete when its events have ended.

    withheld: calls that were written but not delivered. stop_string: what ended the reply.
    """

    reasoning: list[str] = field(default_factory=list[str])
    content: list[str] = field(default_factory=list[str])
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    withheld: list[ToolCall] = field(default_factory=list[ToolCall])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    finish_reason: Finish = "stop"
    stop_string: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of the visible reply with its log-probabilities."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]
    reasoning: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Which calls a client gets, and when.

    at_once: arguments as they are written, instead of whole calls; a call that is then not to be
    delivered stays without its end. repaired: also calls that were rebuilt by guesswork.
    forbidden: none at all, the client asked for none. single: only the first. names: only calls of
    these tools, where there are any names.
    """

    at_once: bool = False
    repaired: bool = False
    forbidden: bool = False
    single: bool = False
    names: frozenset[str] = frozenset()

    def allows(self, name: str) -> bool:
        """Whether a call of this tool may be delivered at all."""
        return not self.forbidden and (not self.names or name in self.names)


# What the server does around every completion: a slot before it, counters and the store behind it.
Watch = Callable[["Turn"], AbstractAsyncContextManager[None]]


class Turn:
    """One completion of a request. Iterate over `events` once; `account` grows meanwhile."""

    def __init__(
        self,
        backend: Backend,
        request: GenerationRequest,
        ask: PromptRequest,
        delivery: Delivery,
        make_id: Callable[[int], str],
        watch: Watch,
    ) -> None:
        self.account = Account(prompt_tokens=len(request.prompt))
        self.records: list[TokenRecord] = []
        self._backend = backend
        self._request = request
        self._delivery = delivery
        self._watch = watch
        self._parser = ask.parser(make_id=make_id, stream_arguments=delivery.at_once)
        self._markers = _markers(backend.tokenizer)
        self._begun = (-1, 0)  # the call that the client sees come, and how much of its arguments
        self._stops = bool(ask.stop)
        self._wants_records = ask.top_logprobs is not None
        self._pending: deque[TokenRecord] = deque()
        self._uncovered = ""  # text shown whose tokens are not in `records` yet
        self._over = False

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What the client may see, a list whenever something came; the first token always counts.

        Closing this generator cancels the work behind it.
        """
        reason = "stop"
        async with self._watch(self), aclosing(self._backend.generate(self._request)) as outputs:
            async for output in outputs:
                if isinstance(output, TokenOutput):
                    events = self._take(output)
                    if events or self.account.completion_tokens == 1:
                        yield events
                    if self._over:
                        break
                elif isinstance(output, Prefilled):
                    self.account.prompt_tokens = output.prompt_tokens
                    self.account.cached_tokens = output.cached_tokens
                else:
                    reason = output.finish_reason
                    self._correct(output)
            rest = self._finish(reason)
        yield rest

    def take_records(self) -> list[TokenRecord]:
        """The log-probabilities of what was shown since the last call."""
        records, self.records = self.records, []
        return records

    def _take(self, output: TokenOutput) -> list[Event]:
        account, token = self.account, output.token_id
        account.completion_tokens += 1
        thinks = self._parser.stage == "reasoning"
        if thinks:
            account.reasoning_tokens += 1
        if token is None:
            events = self._parser.feed(output.text)
        elif token not in self._markers:
            events = self._parser.feed(output.text, False)
        else:
            events = self._feed_marker(output.text, self._markers[token])
        if self._wants_records and token is not None and self._markers.get(token, THINK) == THINK:
            self._pending.append(
                TokenRecord(token, output.text, output.logprob, output.top, thinks)
            )
        return self._shown(events)

    def _feed_marker(self, text: str, marker: str) -> list[Event]:
        # Only the id tells markup from text that spells it. A character that was unfinished when
        # the marker came stands before it, and the stop token has no text at all.
        before = text.removesuffix(marker)
        events = self._parser.feed(before, False) if before else []
        return events if before == text else events + self._parser.feed(marker, True)

    def _shown(self, events: list[Event]) -> list[Event]:
        account, shown = self.account, []
        for event in events:
            if isinstance(event, ContentDelta):
                account.content.append(event.text)
                shown.append(event)
                self._cover(event.text, reasoning=False)
            elif isinstance(event, ReasoningDelta):
                account.reasoning.append(event.text)
                shown.append(event)
                self._cover(event.text, reasoning=True)
            elif isinstance(event, Diagnosed):
                account.diagnostics.append(event.diagnostic)
            else:
                shown += self._call_event(event)
                if self._over:
                    break
        if self._stops and self._parser.stopped is not None:
            account.stop_string = self._parser.stopped
            self._over = True
        return shown

    def _call_event(self, event: CallStarted | ArgumentsDelta | CallFinished) -> list[Event]:
        delivery = self._delivery
        if not isinstance(event, CallFinished):
            if isinstance(event, CallStarted):
                if not delivery.at_once or not delivery.allows(event.name):
                    return []
                self._begun = (event.index, 0)
            elif self._begun[0] != event.index:
                return []
            else:
                self._begun = (event.index, self._begun[1] + len(event.text))
            return [event]
        call = event.call
        if not self._may_deliver(call):
            self.account.withheld.append(call)
            return []
        self.account.calls.append(call)
        self._over = delivery.single
        index, size = self._begun
        if index == event.index and size < len(call.arguments):
            # Repaired: the parser told only its beginning.
            return [ArgumentsDelta(index, call.arguments[size:]), event]
        return [event]

    def _may_deliver(self, call: ToolCall) -> bool:
        if call.partial or not self._delivery.allows(call.name):
            return False
        return self._delivery.repaired or not call.repaired

    def _cover(self, text: str, *, reasoning: bool) -> None:
        """Move the records of tokens whose text is now shown; what is not shown is dropped.

        That is markup, and the line breaks around thoughts and before the answer.
        """
        if not self._wants_records:
            return
        self._uncovered += text
        while self._pending and self._uncovered:
            record = self._pending.popleft()
            if record.reasoning != reasoning:
                continue
            said = record.text
            if not self._uncovered.startswith("\n"):
                said = said.lstrip("\n")
            if said or not record.text:  # no text yet: a part of a character
                self.records.append(record)
                self._uncovered = self._uncovered[len(said) :]

    def _finish(self, reason: str) -> list[Event]:
        account = self.account
        cut = reason == "length"
        events = [] if self._over else self._shown(self._parser.close(truncated=cut))
        if account.stop_string is not None:
            account.finish_reason = "stop"
        elif cut and not self._over:
            account.finish_reason = "length"
        else:
            account.finish_reason = "tool_calls" if account.calls else "stop"
        return events

    def _correct(self, end: GenerationEnd) -> None:
        account = self.account
        if end.prompt_tokens is not None:
            account.prompt_tokens = end.prompt_tokens
        if end.cached_tokens is not None:
            account.cached_tokens = end.cached_tokens
        if end.completion_tokens is not None:
            account.completion_tokens = end.completion_tokens


def _markers(tokenizer: Tokenizer | None) -> dict[int, str]:
    if tokenizer is None:
        return {}
    return {token: tokenizer.decode([token]) for token in tokenizer.special_ids}

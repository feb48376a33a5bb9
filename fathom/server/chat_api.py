"""Chat Completions as it goes out: chunks of a stream, or one whole completion.

The first chunk carries the role, every call delta its index, the arguments of a delivered call are
JSON, and the last chunk of a choice has its side report and one of the finish reasons that clients
know: an unknown one makes some loop without end.

Paper: none (API conventions).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fathom.chat import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCall,
)
from fathom.chat.requests import PromptRequest
from fathom.chat.tokenizer import Tokenizer
from fathom.server.problems import as_problem, error_body
from fathom.server.render import (
    custom_input,
    dumps,
    exhaust_all,
    logprob_entry,
    merged,
    new_id,
    openai_usage,
    side_report,
    text_json,
    to_bytes,
)
from fathom.server.turn import TokenRecord, Turn

KEEP_ALIVE = b": keep-alive\n\n"
REASONING_FIELDS = ("reasoning_content", "reasoning")


class ChatWriter:
    """Writes the completions of one request."""

    def __init__(
        self, ask: PromptRequest, model: str, turns: list[Turn], tokenizer: Tokenizer | None
    ) -> None:
        self.id = new_id("chatcmpl-")
        self._ask = ask
        self._model = model
        self._turns = turns
        self._tokenizer = tokenizer
        self._created = int(time.time())
        head = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": model,
        }
        self._head = "data: " + dumps(head)[:-1]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """All choices, interleaved as they come, then usage and the end mark."""
        choices = [_Choice(self, index, turn) for index, turn in enumerate(self._turns)]
        source = choices[0].stream() if len(choices) == 1 else merged([c.stream() for c in choices])
        async with aclosing(source):
            async for data in source:
                yield data
        tail = ""
        if self._ask.include_usage:
            usage = openai_usage([turn.account for turn in self._turns])
            tail = f'{self._head},"choices":[],"usage":{dumps(usage)}}}\n\n'
        yield to_bytes(tail + "data: [DONE]\n\n")

    async def complete(self) -> dict[str, Any]:
        """The whole completion as one object."""
        await exhaust_all(self._turns)
        accounts = [turn.account for turn in self._turns]
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(at, turn) for at, turn in enumerate(self._turns)],
            "usage": openai_usage(accounts),
        }
        report = side_report(accounts)
        return body | {"fathom": report} if report else body

    def fail(self, error: Exception) -> bytes:
        """The event that ends a stream in trouble."""
        body = error_body(as_problem(error), "openai", self.id)
        return to_bytes(f"data: {dumps(body)}\n\n")

    def _choice(self, index: int, turn: Turn) -> dict[str, Any]:
        account = turn.account
        content = "".join(account.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not account.calls else None,
        }
        if account.reasoning:
            message |= dict.fromkeys(REASONING_FIELDS, "".join(account.reasoning))
        if account.calls:
            message["tool_calls"] = [self.call_object(call) for call in account.calls]
        logprobs = self.logprobs(turn.take_records()) if self.wants_logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": account.finish_reason,
        }

    def chunk(
        self,
        index: int,
        delta: str,
        finish: str = "null",
        logprobs: str = "null",
        report: dict[str, Any] | None = None,
    ) -> str:
        """One event; `delta`, `finish` and `logprobs` are JSON already."""
        extra = f',"fathom":{dumps(report)}' if report else ""
        return (
            f'{self._head},"choices":[{{"index":{index},"delta":{delta},'
            f'"logprobs":{logprobs},"finish_reason":{finish}}}]{extra}}}\n\n'
        )

    def logprobs(self, records: list[TokenRecord]) -> dict[str, Any]:
        """The log-probabilities of shown tokens, thoughts apart from the answer."""
        return {
            "content": [self._record(r) for r in records if not r.reasoning],
            "reasoning_content": [self._record(r) for r in records if r.reasoning],
            "refusal": None,
        }

    def _record(self, record: TokenRecord) -> dict[str, Any]:
        return logprob_entry(self._tokenizer, record, self._ask.top_logprobs or 0)

    def call_object(self, call: ToolCall) -> dict[str, Any]:
        """A delivered call as a message carries it; a repaired one says so."""
        body: dict[str, Any] = {"id": call.id, "type": "function"}
        if self.is_custom(call.name):
            custom = {"name": call.name, "input": custom_input(call)}
            body |= {"type": "custom", "custom": custom}
        else:
            body["function"] = {"name": call.name, "arguments": call.arguments}
        return body | {"repaired": True} if call.repaired else body

    def is_custom(self, name: str) -> bool:
        """Whether the client declared this tool as one that takes free text."""
        tool = self._ask.find_tool(name)
        return tool is not None and tool.kind == "custom"

    @property
    def wants_logprobs(self) -> bool:
        """Whether chunks carry them."""
        return self._ask.top_logprobs is not None


class _Choice:
    """The chunks of one of the completions."""

    def __init__(self, writer: ChatWriter, index: int, turn: Turn) -> None:
        self._writer = writer
        self._index = index
        self._turn = turn
        self._begun = False
        self._calls = 0  # delivered or begun
        self._open: dict[int, int] = {}  # the parser's index -> the client's
        self._cut = writer.chunk(index, "\0").split("\0")
        self._wants_logprobs = writer.wants_logprobs

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._turn.events()) as events:
            async for batch in events:
                yield to_bytes(self._batch(batch))
        yield to_bytes(self._finish())

    def _batch(self, events: list[Event]) -> str:
        start, end = self._cut
        out = ""
        if not self._begun:
            self._begun = True
            out = f'{start}{{"role":"assistant","content":""}}{end}'
        if self._wants_logprobs:
            records = self._turn.take_records()
            if records and events:
                found = dumps(self._writer.logprobs(records))
                first, *rest = [self._delta(event) for event in events]
                out += self._writer.chunk(self._index, first or "{}", logprobs=found)
                return out + "".join(f"{start}{delta}{end}" for delta in rest if delta)
        for event in events:
            delta = self._delta(event)
            if delta:
                out += f"{start}{delta}{end}"
        return out

    def _delta(self, event: Event) -> str:
        if isinstance(event, ContentDelta):
            return f'{{"content":{text_json(event.text)}}}'
        if isinstance(event, ReasoningDelta):
            text = text_json(event.text)
            return f'{{"reasoning_content":{text},"reasoning":{text}}}'
        if isinstance(event, CallStarted):
            if self._writer.is_custom(event.name):
                return ""  # its text is known at its end
            at = self._open[event.index] = self._calls
            self._calls += 1
            return _call_delta(at, event.id, event.name, "")
        if isinstance(event, ArgumentsDelta):
            if event.index not in self._open:
                return ""
            part = {"index": self._open[event.index], "function": {"arguments": event.text}}
            return dumps({"tool_calls": [part]})
        if isinstance(event, CallFinished) and event.index not in self._open:
            at = self._calls
            self._calls += 1
            if self._writer.is_custom(event.call.name):
                part = {"index": at, **self._writer.call_object(event.call)}
                return dumps({"tool_calls": [part]})
            return _call_delta(at, event.call.id, event.call.name, event.call.arguments)
        return ""

    def _finish(self) -> str:
        finish = self._turn.account.finish_reason
        records = self._turn.take_records() if self._wants_logprobs else []
        found = dumps(self._writer.logprobs(records)) if records else "null"
        # On this chunk, because clients that asked for no usage expect a choice in every one.
        report = side_report([self._turn.account])
        return self._writer.chunk(self._index, "{}", f'"{finish}"', found, report)


def _call_delta(index: int, call_id: str, name: str, arguments: str) -> str:
    call = {
        "index": index,
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return dumps({"tool_calls": [call]})

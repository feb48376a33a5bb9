"""Anthropic Messages as it goes out: named events with usage, signed thoughts, whole inputs.

Paper: none (API conventions).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fathom.chat import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from fathom.chat.requests import sign_reasoning
from fathom.server.problems import Problem, as_problem, error_body
from fathom.server.render import (
    RawJson,
    dumps,
    exhaust_all,
    new_id,
    render_events,
    side_report,
    text_json,
    to_bytes,
)
from fathom.server.turn import Account, Turn

KEEP_ALIVE = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_UNFINISHED = (
    "a tool call that had begun is not delivered, because it was cut off or had to be repaired: "
    "run nothing of it. The field `fathom` of message_delta says more"
)


class MessagesWriter:
    """Writes one message."""

    def __init__(self, turn: Turn, model: str, request_id: str) -> None:
        self.id = new_id("msg_")
        self._turn = turn
        self._model = model
        self._request_id = request_id
        self._begun = False
        self._index = -1
        self._open: str | None = None  # the kind of the block that is being written
        self._thought: list[str] = []
        self._call: int | None = None  # the parser's index of a call that is being written
        self._unfinished = False  # a call began that will never be whole

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The message as events."""
        return render_events(self._turn, self)

    async def complete(self) -> dict[str, Any]:
        """The whole message as one object."""
        await exhaust_all([self._turn])
        account = self._turn.account
        content: list[dict[str, Any]] = []
        reasoning, text = "".join(account.reasoning), "".join(account.content)
        if reasoning:
            content.append(
                {
                    "type": "thinking",
                    "thinking": reasoning,
                    "signature": sign_reasoning(reasoning),
                }
            )
        if text:
            content.append({"type": "text", "text": text})
        content += [
            {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": RawJson(call.arguments),
            }
            for call in account.calls
        ]
        report = side_report([account])
        body = self._message(content, _usage(account)) | _ending(account)
        return body | ({"fathom": report} if report else {})

    def fail(self, error: Exception) -> bytes:
        """The event that ends a stream in trouble."""
        body = error_body(as_problem(error), "anthropic", self._request_id)
        return to_bytes(f"event: error\ndata: {dumps(body)}\n\n")

    def feed(self, events: list[Event], turn: Turn) -> str:
        """Some more events of the message."""
        out = "" if self._begun else self._begin(turn.account)
        for event in events:
            if isinstance(event, ContentDelta):
                out += self._enter("text", {"type": "text", "text": ""})
                out += self._delta(f'{{"type":"text_delta","text":{text_json(event.text)}}}')
            elif isinstance(event, ReasoningDelta):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                out += self._enter("thinking", block)
                self._thought.append(event.text)
                out += self._delta(
                    f'{{"type":"thinking_delta","thinking":{text_json(event.text)}}}'
                )
            elif isinstance(event, CallStarted):
                out += self._leave() + self._enter_call(event.id, event.name)
                self._call = event.index
            elif isinstance(event, ArgumentsDelta):
                out += self._arguments(event.text)
            elif isinstance(event, CallFinished):
                if self._call != event.index:
                    call = event.call
                    out += self._leave() + self._enter_call(call.id, call.name)
                    out += self._arguments(call.arguments)
                self._call = None  # now the block has an end
                out += self._leave()
        return out

    def finish(self, turn: Turn) -> str:
        """The end of the message: an error where a call began that is not delivered.

        Clients make an object of any beginning of an input, and run it; only an error, and no end
        of its block, keeps them from that.
        """
        account = turn.account
        out = "" if self._begun else self._begin(account)
        out += self._leave()
        report = side_report([account])
        event: dict[str, Any] = {
            "type": "message_delta",
            "delta": _ending(account),
            "usage": _usage(account),
        }
        out += _event(event | ({"fathom": report} if report else {}))
        if self._unfinished:
            return out + self.fail(Problem(500, _UNFINISHED)).decode()
        return out + _event({"type": "message_stop"})

    def _begin(self, account: Account) -> str:
        self._begun = True
        empty = {"stop_reason": None, "stop_sequence": None}
        message = self._message([], _usage(account)) | empty
        return _event({"type": "message_start", "message": message}) + KEEP_ALIVE.decode()

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "usage": usage,
        }

    def _enter(self, kind: str, block: dict[str, Any]) -> str:
        if self._open == kind:
            return ""
        out = self._leave()
        self._open = kind
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return out + _event(start)

    def _enter_call(self, call_id: str, name: str) -> str:
        # The input is empty here whatever it will be: clients take it from the deltas.
        return self._enter(
            "tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        )

    def _arguments(self, text: str) -> str:
        return self._delta(f'{{"type":"input_json_delta","partial_json":{text_json(text)}}}')

    def _delta(self, delta: str) -> str:
        return (
            "event: content_block_delta\n"
            f'data: {{"type":"content_block_delta","index":{self._index},"delta":{delta}}}\n\n'
        )

    def _leave(self) -> str:
        if self._open is None:
            return ""
        out = ""
        if self._open == "thinking":
            signature = sign_reasoning("".join(self._thought))
            out = self._delta(dumps({"type": "signature_delta", "signature": signature}))
        if self._open == "tool_use" and self._call is not None:
            self._open, self._call, self._unfinished = None, None, True
            return ""
        self._open = None
        return out + _event({"type": "content_block_stop", "index": self._index})


def _event(body: dict[str, Any]) -> str:
    return f"event: {body['type']}\ndata: {dumps(body)}\n\n"


def _ending(account: Account) -> dict[str, Any]:
    if account.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": account.stop_string}
    return {"stop_reason": _STOPS[account.finish_reason], "stop_sequence": None}


def _usage(account: Account) -> dict[str, Any]:
    """Anthropic counts cached tokens apart from the input."""
    return {
        "input_tokens": account.prompt_tokens - account.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": account.cached_tokens,
        "output_tokens": account.completion_tokens,
    }

"""OpenAI Responses as it goes out: items, each with its full sequence of events.

Reasoning goes out twice in one item, as text and as an opaque token that carries it: some clients
return only the one, some only the other. Calls go back to what the client declared: a function,
maybe of a namespace, a custom tool with free text, or its own search for tools.

Paper: none (API conventions).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fathom.chat import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    ToolCall,
)
from fathom.chat.requests import PromptRequest, ToolSpec, pack_reasoning
from fathom.server.problems import Problem, as_problem
from fathom.server.render import (
    RawJson,
    custom_input,
    dumps,
    exhaust_all,
    new_id,
    render_events,
    side_report,
    text_json,
    to_bytes,
)
from fathom.server.turn import Account, TokenRecord, Turn

KEEP_ALIVE = b": keep-alive\n\n"

Keep = Callable[[str, list[Message], dict[str, Any]], None]


class ResponsesWriter:
    """Writes one response; `keep` stores it when it is complete."""

    def __init__(
        self,
        request: PromptRequest,
        turn: Turn,
        model: str,
        keep: Keep,
        record: Callable[[TokenRecord], dict[str, Any]],
        echoed: dict[str, Any],
    ) -> None:
        self.id = new_id("resp_")
        self._request = request
        self._turn = turn
        self._model = model
        self._keep = keep
        self._record = record
        self._echoed = echoed
        self._created = int(time.time())
        self._sequence = 0
        self._begun = False
        self._output: list[dict[str, Any]] = []  # finished items
        self._open: _Open | None = None
        self._unfinished = False  # a call began that will never be whole

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events."""
        return render_events(self._turn, self)

    async def complete(self) -> dict[str, Any]:
        """The whole response as one object."""
        await exhaust_all([self._turn])
        account = self._turn.account
        events: list[Event] = []
        if account.reasoning:
            events.append(ReasoningDelta("".join(account.reasoning)))
        if account.content:
            events.append(ContentDelta("".join(account.content)))
        events += [CallFinished(at, call) for at, call in enumerate(account.calls)]
        self.feed(events, self._turn)
        self._close()
        return self._end(account)

    def fail(self, error: Exception) -> bytes:
        """The event that ends a stream in trouble, behind those that begin it."""
        begin = "" if self._begun else self._begin()
        problem = as_problem(error)
        body = self._body("failed") | {
            "error": {"code": "server_error", "message": problem.message}
        }
        return to_bytes(begin + self._event("response.failed", response=body))

    def feed(self, events: list[Event], turn: Turn) -> str:
        """Some more events of the response."""
        out = "" if self._begun else self._begin()
        for event in events:
            if isinstance(event, ContentDelta):
                out += self._enter("message")
                out += self._text_delta("response.output_text.delta", event.text)
            elif isinstance(event, ReasoningDelta):
                out += self._enter("reasoning")
                out += self._text_delta("response.reasoning_text.delta", event.text)
            elif isinstance(event, CallStarted):
                if self._spec(event.name).kind == "function":
                    call = ToolCall(id=event.id, name=event.name, arguments="")
                    out += self._enter_call(call, event.index)
            elif isinstance(event, ArgumentsDelta):
                if self._open is not None and self._open.call == event.index:
                    out += self._arguments_delta(event.text)
            elif isinstance(event, CallFinished):
                out += self._finish_call(event)
        return out

    def finish(self, turn: Turn) -> str:
        """The end of the response."""
        out = "" if self._begun else self._begin()
        out += self._close()
        body = self._end(turn.account)
        return out + self._event(f"response.{body['status']}", response=body)

    def _begin(self) -> str:
        self._begun = True
        body = self._body("in_progress")
        created = self._event("response.created", response=body)
        return created + self._event("response.in_progress", response=body)

    # Items

    def _enter(self, kind: str) -> str:
        if self._open is not None and self._open.kind == kind:
            return ""
        out = self._close()
        if kind == "reasoning":
            item: dict[str, Any] = {"id": new_id("rs_"), "type": "reasoning", "summary": [],
                                    "content": [], "encrypted_content": None}  # fmt: skip
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        self._open = _Open(kind, item)
        out += self._item_event("response.output_item.added", item=item)
        return out + self._part_event("response.content_part.added", part=part)

    def _text_delta(self, name: str, text: str) -> str:
        assert self._open is not None
        self._open.text.append(text)
        self._sequence += 1
        head = self._open.head or self._make_head(name)
        return f'{head}{self._sequence - 1},"delta":{text_json(text)}}}\n\n'

    def _make_head(self, name: str) -> str:
        """The constant beginning of an item's deltas."""
        assert self._open is not None
        body: dict[str, Any] = {"type": name, "item_id": self._open.item["id"],
                                "output_index": len(self._output), "content_index": 0}  # fmt: skip
        if self._open.kind == "message":
            body["logprobs"] = []
        self._open.head = f'event: {name}\ndata: {dumps(body)[:-1]},"sequence_number":'
        return self._open.head

    def _close(self) -> str:
        opened, self._open = self._open, None
        if opened is None:
            return ""
        self._open = opened  # the events name it
        text, item = "".join(opened.text), opened.item
        if opened.kind == "call":
            # Cut off or repaired, so it has no end: its arguments are a beginning that is no JSON.
            self._unfinished = True
            item |= {"arguments": text, "status": "incomplete"}
            return self._end_item()
        if opened.kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": text}
            item["encrypted_content"] = pack_reasoning(text)
            out = self._part_event("response.reasoning_text.done", text=text)
        else:
            logprobs = [self._record(r) for r in self._turn.take_records() if not r.reasoning]
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
            out = self._part_event("response.output_text.done", text=text, logprobs=logprobs)
        item |= {"content": [part], "status": "completed"}
        out += self._part_event("response.content_part.done", part=part)
        return out + self._end_item()

    def _enter_call(self, call: ToolCall, index: int) -> str:
        out = self._close()
        item = _call_item(call, self._spec(call.name)) | {"status": "in_progress"}
        self._open = _Open("call", item, call=index)
        return out + self._item_event("response.output_item.added", item=item)

    def _arguments_delta(self, text: str) -> str:
        assert self._open is not None
        self._open.text.append(text)
        return self._item_event("response.function_call_arguments.delta", delta=text)

    def _finish_call(self, event: CallFinished) -> str:
        call, spec, out = event.call, self._spec(event.call.name), ""
        begun = self._open is not None and self._open.call == event.index
        if not begun:
            empty = ToolCall(id=call.id, name=call.name, arguments="{}")
            out = self._enter_call(empty, event.index)
        assert self._open is not None
        item = self._open.item
        item |= _call_item(call, spec) | {"id": item["id"], "status": "completed"}
        if spec.kind == "function":
            if not begun:
                out += self._arguments_delta(call.arguments)
            out += self._item_event(
                "response.function_call_arguments.done",
                arguments=call.arguments,
                name=item["name"],
            )
        elif spec.kind == "custom":
            out += self._item_event("response.custom_tool_call_input.delta", delta=item["input"])
            out += self._item_event("response.custom_tool_call_input.done", input=item["input"])
        return out + self._end_item()

    def _end_item(self) -> str:
        assert self._open is not None
        out = self._item_event("response.output_item.done", item=self._open.item)
        self._output.append(self._open.item)
        self._open = None
        return out

    def _spec(self, name: str) -> ToolSpec:
        return self._request.find_tool(name) or ToolSpec(name=name, local_name=name)

    # Events and the response itself

    def _event(self, event: str, /, **fields: Any) -> str:
        body = {"type": event, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {event}\ndata: {dumps(body)}\n\n"

    def _item_event(self, event: str, /, **fields: Any) -> str:
        at = {"output_index": len(self._output)}
        if "item" not in fields and self._open is not None:
            at |= {"item_id": self._open.item["id"]}
        return self._event(event, **at, **fields)

    def _part_event(self, event: str, /, **fields: Any) -> str:
        return self._item_event(event, content_index=0, **fields)

    def _end(self, account: Account) -> dict[str, Any]:
        cut = account.finish_reason == "length"
        body = self._body("incomplete" if cut or self._unfinished else "completed") | {
            "output": self._output,
            "usage": _usage(account),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }
        if self._unfinished and not cut:
            body["incomplete_details"] = {"reason": "repaired_call"}
        report = side_report([account])
        if report:
            body["fathom"] = report
        if self._request.metadata.get("store") is not False:
            answer = Message(
                reasoning="".join(account.reasoning),
                content="".join(account.content),
                tool_calls=account.calls,
            )
            self._keep(self.id, [*self._request.carried, answer], body)
        return body

    def _body(self, status: str) -> dict[str, Any]:
        request = self._request
        choice = request.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": request.max_tokens,
            "model": self._model,
            "output": [],
            "parallel_tool_calls": choice.parallel,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.effort, "summary": None},
            "store": request.metadata.get("store") is not False,
            "temperature": request.default_sampling().temperature,
            "top_p": request.default_sampling().top_p,
            "truncation": "disabled",
            "usage": None,
            **self._echoed,
        }


def echo(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a response repeats of its request as it was. Raises Problem for what is not JSON."""
    text: Mapping[str, Any] = body.get("text") or {}
    found = {
        "instructions": body.get("instructions"),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "metadata": body.get("metadata") or {},
        "text": {"format": {"type": "text"}} | {k: v for k, v in text.items() if v is not None},
    }
    for name, value in found.items():
        try:
            found[name] = RawJson(dumps(value))
        except ValueError:
            raise Problem(
                400, f"{name} holds a number that JSON does not have", param=name
            ) from None
    return found


class _Open:
    """The item that is being written."""

    __slots__ = ("call", "head", "item", "kind", "text")

    def __init__(self, kind: str, item: dict[str, Any], call: int | None = None) -> None:
        self.kind = kind
        self.item = item
        self.call = call
        self.text: list[str] = []
        self.head = ""


def _call_item(call: ToolCall, spec: ToolSpec) -> dict[str, Any]:
    name = spec.local_name or call.name
    if spec.kind == "custom":
        item = {"type": "custom_tool_call", "id": new_id("ctc_"), "call_id": call.id, "name": name,
                "input": custom_input(call)}  # fmt: skip
    elif spec.kind == "tool_search":
        return {"type": "tool_search_call", "id": new_id("tsc_"), "call_id": call.id,
                "execution": "client", "arguments": RawJson(call.arguments)}  # fmt: skip
    else:
        item = {"type": "function_call", "id": new_id("fc_"), "call_id": call.id, "name": name,
                "arguments": call.arguments}  # fmt: skip
    if spec.namespace:
        item["namespace"] = spec.namespace
    return item | {"repaired": True} if call.repaired else item


def _usage(account: Account) -> dict[str, Any]:
    return {
        "input_tokens": account.prompt_tokens,
        "input_tokens_details": {"cached_tokens": account.cached_tokens},
        "output_tokens": account.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": account.reasoning_tokens},
        "total_tokens": account.prompt_tokens + account.completion_tokens,
    }

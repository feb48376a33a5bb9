"""Responses: `POST /v1/responses`.

Paper: none (the API is OpenAI's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fathom.chat.messages import Message, ToolCall, as_mapping
from fathom.chat.requests.carrier import Unpacker
from fathom.chat.requests.common import (
    read_format,
    read_sampling,
    read_shaping,
    take_metadata,
    warn_unknown,
)
from fathom.chat.requests.effort import read_switch, read_thinking
from fathom.chat.requests.fields import Fields
from fathom.chat.requests.history import (
    BLANK,
    Entry,
    finish_conversation,
    object_text,
)
from fathom.chat.requests.parts import read_content, read_part
from fathom.chat.requests.tools import ToolReader, choose, prompt_name, read_chat_choice
from fathom.chat.requests.types import MOST_TOKENS, PromptRequest, RequestOptions, ToolSpec

_ROLES = ("system", "developer", "user", "assistant")
_METADATA = (
    "user",
    "metadata",
    "store",
    "include",
    "prompt_cache_key",
    "safety_identifier",
    "client_metadata",
    "service_tier",
    "truncation",
)
_IGNORED_ITEMS = (
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
)
_SEARCH = "tool_search"


def read_responses(
    body: Mapping[str, Any],
    options: RequestOptions | None = None,
    history: Sequence[Message] = (),
    found_tools: Sequence[ToolSpec] = (),
) -> PromptRequest:
    """Read the body of a Responses request. Raises RequestError.

    `history` are the messages of `previous_response_id`: `carried` of the request that led to it,
    and its answer. `found_tools` are those of that request.
    """
    options = options or RequestOptions()
    fields, warnings = Fields(body), list[str]()
    for name in ("conversation", "background", "prompt"):
        if fields.take(name):
            fields.fail(name, "is not supported: send the conversation as input")
    reader = _ItemReader(warnings)
    reader.read(fields)
    past = [Entry(message, f"previous_response_id[{at}]") for at, message in enumerate(history)]
    talk = finish_conversation(
        [*past, *reader.entries],
        options,
        instructions=fields.text("instructions") or "",
        field="input",
    )
    thinking, effort = _read_thinking(fields, options)
    tools_reader = ToolReader(warnings)
    tools_reader.responses(fields.objects("tools"))
    parallel = fields.boolean("parallel_tool_calls") is not False
    tools, tool_choice = choose(
        tools_reader.tools,
        read_chat_choice(fields.take("tool_choice"), "tool_choice", parallel=parallel),
        param="tool_choice",
        keep_when_none=options.keep_tools_when_none,
        thinks=thinking != "off",
    )
    text = fields.object("text")
    response_format = read_format(text.object("format") if text else None, "")
    request = PromptRequest(
        api="responses",
        model=fields.text("model"),
        messages=talk.messages,
        carried=talk.carried,
        restored=talk.restored,
        tools=tools,
        found_tools=[*reader.found_tools, *found_tools],
        tool_choice=tool_choice,
        thinking=thinking,
        effort=effort,
        response_format=response_format,
        stop=(),
        sampling=read_sampling(fields),
        shaping=read_shaping(fields),
        max_tokens=fields.integer("max_output_tokens", 1, MOST_TOKENS),
        n=1,
        top_logprobs=fields.integer("top_logprobs", 0, 20),
        stream=fields.boolean("stream") or False,
        include_usage=True,
        stream_arguments=fields.boolean("stream_arguments"),
        previous_response_id=fields.text("previous_response_id"),
        metadata=take_metadata(fields, _METADATA),
        warnings=(),
        revision=options.revision,
    )
    warn_unknown(fields, warnings)
    return replace(request, warnings=tuple(warnings))


def _read_thinking(fields: Fields, options: RequestOptions) -> tuple[str, str | None]:
    reasoning = fields.object("reasoning")
    effort = reasoning.text("effort") if reasoning else None
    mode = read_thinking(
        read_switch(fields), effort, "reasoning.effort", options.revision, options.default_effort
    )
    return mode, effort


@dataclass(slots=True, kw_only=True)
class _Turn:
    """An assistant turn while its items come in."""

    path: str
    reasoning: list[str] = field(default_factory=list[str])
    texts: list[str] = field(default_factory=list[str])
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    reasoned: bool = False

    def entry(self) -> Entry:
        message = Message(
            reasoning=BLANK.join(self.reasoning),
            content=BLANK.join(self.texts),
            tool_calls=self.calls,
        )
        return Entry(message, self.path, self.reasoned)


class _ItemReader:
    """Puts the items of `input` together again into turns."""

    def __init__(self, warnings: list[str]) -> None:
        self.entries: list[Entry] = []
        self.found_tools: list[ToolSpec] = []
        self._warnings = warnings
        self._unpack = Unpacker()
        self._turn: _Turn | None = None

    def read(self, fields: Fields) -> None:
        """Read the field `input`."""
        value = fields.mapping.get("input")
        if isinstance(value, str):
            fields.ignore(("input",))
            self.entries.append(Entry(Message(role="user", content=value), "input"))
            return
        for item in fields.objects("input"):
            self._item(item)
        self._end_turn()

    def _item(self, item: Fields) -> None:
        kind = item.text("type") or "message"
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            self._reasoning(item)
        elif kind in ("function_call", "custom_tool_call", "tool_search_call"):
            self._open_turn(item).calls.append(_read_call(item, kind))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._result(item, read_content(item, "output", self._warnings) or "")
        elif kind == "tool_search_output":
            self._search_result(item)
        elif kind in _IGNORED_ITEMS:
            self._warnings.append(f"{item.path('type')}: an item of type {kind!r} was left out")
        else:
            item.fail("type", f"items of type {kind!r} are not supported")

    def _message(self, item: Fields) -> None:
        role = item.choice("role", _ROLES)
        content = read_content(item, "content", self._warnings)
        if role is None:
            item.fail("role", f"is missing: use one of {', '.join(_ROLES)}")
        if role == "assistant":
            turn = self._open_turn(item, new=bool(self._turn and self._turn.calls))
            turn.texts += [content] if content else []
            return
        if content is None:
            item.fail("content", f"is missing: a {role} message needs content")
        self._end_turn()
        # As hosted, a developer message is part of the user turn.
        role = "user" if role == "developer" else role
        self.entries.append(Entry(Message(role=role, content=content), item.here))

    def _reasoning(self, item: Fields) -> None:
        turn = self._turn
        turn = self._open_turn(item, new=bool(turn and (turn.texts or turn.calls)))
        reasoning, known = self._read_reasoning(item)
        turn.reasoned |= known
        turn.reasoning += [reasoning] if reasoning else []

    def _read_reasoning(self, item: Fields) -> tuple[str, bool]:
        """Return the reasoning: its text, else what we packed, else the summary."""
        parts = [read_part(part, self._warnings) for part in item.objects("content")]
        if any(parts):
            return BLANK.join(parts), True
        packed = item.text("encrypted_content")
        reasoning = self._unpack(packed) if packed else None
        if reasoning is not None:
            return reasoning, True
        summary = [read_part(part, self._warnings) for part in item.objects("summary")]
        if packed and not any(summary):
            self._warnings.append(
                f"{item.path('encrypted_content')}: reasoning of another server was left out"
            )
        return BLANK.join(summary), any(summary)

    def _result(self, item: Fields, content: str) -> None:
        self._end_turn()
        message = Message(role="tool", content=content, tool_call_id=item.required_text("call_id"))
        self.entries.append(Entry(message, item.here))

    def _search_result(self, item: Fields) -> None:
        """Take tools that a search of the client found: the model reads them as its result."""
        tools = item.items("tools") or []
        reader = ToolReader(self._warnings)
        reader.responses(item.objects("tools"))
        self.found_tools += reader.tools
        shown = [tool.schema() for tool in reader.tools] if reader.tools else tools
        self._result(item, json.dumps(shown, ensure_ascii=False))

    def _open_turn(self, item: Fields, *, new: bool = False) -> _Turn:
        if new:
            self._end_turn()
        if self._turn is None:
            self._turn = _Turn(path=item.here)
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self.entries.append(self._turn.entry())
        self._turn = None


def _read_call(item: Fields, kind: str) -> ToolCall:
    call_id = item.required_text("call_id")
    if kind == "tool_search_call":
        arguments = item.take("arguments")
        is_object = as_mapping(arguments) is not None
        text = json.dumps(arguments, ensure_ascii=False) if is_object else str(arguments or "{}")
        return ToolCall(id=call_id, name=_SEARCH, arguments=object_text(text))
    name = prompt_name(item.required_text("name"), item.text("namespace"))
    if kind == "custom_tool_call":
        given = {"input": item.text("input") or ""}
        return ToolCall(id=call_id, name=name, arguments=json.dumps(given, ensure_ascii=False))
    return ToolCall(id=call_id, name=name, arguments=object_text(item.text("arguments") or ""))

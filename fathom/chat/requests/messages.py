"""Messages: `POST /v1/messages`.

Paper: none (the API is Anthropic's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fathom.chat.messages import Message, ToolCall, as_mapping
from fathom.chat.requests.carrier import Unpacker
from fathom.chat.requests.common import (
    read_format,
    read_sampling,
    read_shaping,
    read_stop,
    take_metadata,
    warn_unknown,
)
from fathom.chat.requests.effort import read_switch, read_thinking
from fathom.chat.requests.fields import Fields
from fathom.chat.requests.history import BLANK, Entry, finish_conversation
from fathom.chat.requests.parts import read_content, read_part
from fathom.chat.requests.tools import ToolReader, choose, read_messages_choice
from fathom.chat.requests.types import MOST_TOKENS, PromptRequest, RequestOptions
from fathom.errors import ThreadUnsupported

# The line changes with the first user message. As part of the prompt it would keep conversations
# from sharing everything behind it.
_BILLING = "x-anthropic-billing-header:"
_METADATA = ("metadata", "service_tier", "container")
_HARMLESS = ("context_management", "cache_control", "betas", "inference_geo")


def read_messages(body: Mapping[str, Any], options: RequestOptions | None = None) -> PromptRequest:
    """Read the body of a Messages request. Raises RequestError."""
    options = options or RequestOptions()
    fields, warnings = Fields(body), list[str]()
    if fields.take("thread") is not None:
        raise ThreadUnsupported("is not supported: send the whole conversation", "thread")
    system, billing = _read_system(fields, warnings)
    entries: list[Entry] = []
    unpack = Unpacker()
    for item in fields.objects("messages"):
        entries += _read_message(item, unpack, warnings)
    switch = read_switch(fields)
    config = fields.object("output_config")
    effort = config.text("effort") if config else None
    thinking = read_thinking(
        switch, effort, "output_config.effort", options.revision, options.default_effort
    )
    entries = _continue_last(entries, thinking, warnings)
    talk = finish_conversation(entries, options, instructions=system, field="messages")
    reader = ToolReader(warnings)
    reader.messages(fields.objects("tools"))
    tools, tool_choice = choose(
        reader.tools,
        read_messages_choice(fields.object("tool_choice")),
        param="tool_choice",
        keep_when_none=options.keep_tools_when_none,
        thinks=thinking != "off",
    )
    form = (config.object("format") if config else None) or fields.object("output_format")
    limit = fields.integer("max_tokens", 1, 1 << 31)
    metadata = take_metadata(fields, _METADATA)
    fields.ignore(_HARMLESS)
    request = PromptRequest(
        api="messages",
        model=fields.text("model"),
        messages=talk.messages,
        carried=talk.carried,
        restored=talk.restored,
        tools=tools,
        found_tools=[],
        tool_choice=tool_choice,
        thinking=thinking,
        effort=effort,
        response_format=read_format(form, ""),
        stop=read_stop(fields, "stop_sequences"),
        sampling=read_sampling(fields),
        shaping=read_shaping(fields),
        max_tokens=None if limit is None else min(limit, MOST_TOKENS),
        n=1,
        top_logprobs=None,
        stream=fields.boolean("stream") or False,
        include_usage=True,
        stream_arguments=fields.boolean("stream_arguments"),
        previous_response_id=None,
        metadata=metadata | ({"billing": billing} if billing else {}),
        warnings=(),
        revision=options.revision,
    )
    warn_unknown(fields, warnings)
    return replace(request, warnings=tuple(warnings))


def _read_system(fields: Fields, warnings: list[str]) -> tuple[str, list[str]]:
    """Return the system text, and apart from it the lines that are no instruction."""
    value = fields.take("system")
    if value is None:
        return "", []
    if isinstance(value, str):
        texts = [value]
    else:
        texts = [read_part(part, warnings) for part in fields.objects("system")]
    billing = [text for text in texts if text.startswith(_BILLING)]
    return BLANK.join(text for text in texts if not text.startswith(_BILLING)), billing


def _read_message(fields: Fields, unpack: Unpacker, warnings: list[str]) -> list[Entry]:
    role = fields.choice("role", ("user", "assistant", "system"))
    path = fields.here
    if role is None:
        fields.fail("role", "is missing: use user, assistant or system")
    if role == "assistant":
        return [_read_assistant(fields, path, unpack, warnings)]
    content = fields.mapping.get("content")
    if role == "user" and isinstance(content, list):
        return _read_user_blocks(fields, path, warnings)
    text = read_content(fields, "content", warnings)
    if text is None:
        fields.fail("content", f"is missing: a {role} message needs content")
    return [Entry(Message(role=role, content=text), path)]


def _read_user_blocks(fields: Fields, path: str, warnings: list[str]) -> list[Entry]:
    """Return the results of a user message and, if there is any, its text."""
    results: list[Entry] = []
    texts: list[str] = []
    for part in fields.objects("content"):
        part.ignore(("cache_control",))
        if part.mapping.get("type") != "tool_result":
            texts.append(read_part(part, warnings))
            continue
        if texts:
            part.fail("type", "tool results come first: move this block before the text")
        message = Message(
            role="tool",
            content=read_content(part, "content", warnings) or "",
            tool_call_id=part.required_text("tool_use_id"),
        )
        results.append(Entry(message, part.here))
    if texts or not results:
        text = BLANK.join(text for text in texts if text)
        results.append(Entry(Message(role="user", content=text), path))
    return results


def _read_assistant(fields: Fields, path: str, unpack: Unpacker, warnings: list[str]) -> Entry:
    content = fields.mapping.get("content")
    if isinstance(content, str):
        return Entry(Message(content=content), path, False)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    if content is None:
        fields.fail("content", "is missing: an assistant message needs content")
    for part in fields.objects("content"):
        kind = part.required_text("type")
        if kind == "thinking":
            thoughts.append(part.required_text("thinking"))
        elif kind == "redacted_thinking":
            thoughts += _read_redacted(part, unpack, warnings)
        elif kind == "tool_use":
            calls.append(_read_call(part))
        elif kind in ("server_tool_use", "mcp_tool_use") or kind.endswith("_tool_result"):
            warnings.append(f"{part.path('type')}: a block of type {kind!r} was left out")
        else:
            texts.append(read_part(part, warnings))
    message = Message(content=BLANK.join(texts), reasoning=BLANK.join(thoughts), tool_calls=calls)
    return Entry(message, path, bool(thoughts))


def _read_redacted(part: Fields, unpack: Unpacker, warnings: list[str]) -> list[str]:
    reasoning = unpack(part.text("data") or "")
    if reasoning is None:
        warnings.append(f"{part.path('data')}: reasoning of another server was left out")
        return []
    return [reasoning]


def _read_call(part: Fields) -> ToolCall:
    arguments = as_mapping(part.take("input"))
    if arguments is None:
        part.fail("input", "must be an object")
    return ToolCall(
        id=part.required_text("id"),
        name=part.required_text("name"),
        arguments=json.dumps(arguments, ensure_ascii=False),
    )


def _continue_last(entries: list[Entry], thinking: str, warnings: list[str]) -> list[Entry]:
    """Let the model go on with a last assistant message, where it does not think first."""
    if not entries or entries[-1].message.role != "assistant" or entries[-1].message.tool_calls:
        return entries
    last = entries[-1]
    if thinking != "off":
        warnings.append(f"{last.path}: not continued, because the model thinks before it answers")
        return entries
    return [*entries[:-1], last._replace(message=replace(last.message, prefix=True))]

"""Chat Completions: `POST /v1/chat/completions`.

Paper: none (the API is OpenAI's with DeepSeek's additions).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from fathom.chat.messages import Message, ToolCall, as_mapping
from fathom.chat.quick import TASKS
from fathom.chat.requests.common import (
    read_format,
    read_sampling,
    read_shaping,
    read_stop,
    take_metadata,
    warn_unknown,
)
from fathom.chat.requests.effort import read_switch, read_template_arguments, read_thinking
from fathom.chat.requests.fields import Fields
from fathom.chat.requests.history import Entry, finish_conversation, object_text
from fathom.chat.requests.parts import read_content
from fathom.chat.requests.tools import ToolReader, choose, prompt_name, read_chat_choice
from fathom.chat.requests.types import MOST_TOKENS, PromptRequest, RequestOptions

_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_ANSWER = ("reasoning_content", "tool_calls", "refusal")
_METADATA = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
)


def read_chat(body: Mapping[str, Any], options: RequestOptions | None = None) -> PromptRequest:
    """Read the body of a Chat Completions request. Raises RequestError."""
    options = options or RequestOptions()
    fields, warnings = Fields(body), list[str]()
    talk = finish_conversation(
        [_read_message(item, warnings) for item in fields.objects("messages")],
        options,
        field="messages",
    )
    thinking, effort = _read_thinking(fields, options)
    reader = ToolReader(warnings)
    reader.chat(fields.objects("tools"))
    parallel = fields.boolean("parallel_tool_calls")
    tools, tool_choice = choose(
        reader.tools,
        read_chat_choice(fields.take("tool_choice"), "tool_choice", parallel=parallel is not False),
        param="tool_choice",
        keep_when_none=options.keep_tools_when_none,
        thinks=thinking != "off",
    )
    response_format = read_format(fields.object("response_format"))
    logprobs = fields.boolean("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, 20)
    stream_options = fields.object("stream_options")
    limit = fields.integer("max_completion_tokens", 1, MOST_TOKENS)
    request = PromptRequest(
        api="chat",
        model=fields.text("model"),
        messages=talk.messages,
        carried=talk.carried,
        restored=talk.restored,
        tools=tools,
        found_tools=[],
        tool_choice=tool_choice,
        thinking=thinking,
        effort=effort,
        response_format=response_format,
        stop=read_stop(fields, "stop"),
        sampling=read_sampling(fields),
        shaping=read_shaping(fields),
        max_tokens=fields.integer("max_tokens", 1, MOST_TOKENS) if limit is None else limit,
        n=fields.integer("n", 1, options.most_choices) or 1,
        top_logprobs=(top_logprobs or 0) if logprobs or top_logprobs else None,
        stream=fields.boolean("stream") or False,
        include_usage=bool(stream_options and stream_options.boolean("include_usage")),
        stream_arguments=fields.boolean("stream_arguments"),
        previous_response_id=None,
        metadata=take_metadata(fields, _METADATA),
        warnings=(),
        revision=options.revision,
    )
    fields.ignore(("max_tokens",))
    warn_unknown(fields, warnings)
    return replace(request, warnings=tuple(warnings))


def _read_thinking(fields: Fields, options: RequestOptions) -> tuple[str, str | None]:
    switch, effort = read_switch(fields), fields.text("reasoning_effort")
    template = fields.object("chat_template_kwargs")
    if template is not None:
        other_switch, other_effort = read_template_arguments(template.mapping)
        switch, effort = switch or other_switch, effort or other_effort
    enable = fields.boolean("enable_thinking")
    if switch is None and enable is not None:
        switch = "enabled" if enable else "disabled"
    mode = read_thinking(
        switch, effort, "reasoning_effort", options.revision, options.default_effort
    )
    return mode, effort


def _read_message(fields: Fields, warnings: list[str]) -> Entry:
    role = fields.choice("role", _ROLES)
    path = fields.here
    if role is None and not fields.mapping.keys().isdisjoint(_ANSWER):
        role = "assistant"  # a client's own helper loses the role of a streamed answer
    if role is None:
        fields.fail("role", f"is missing: use one of {', '.join(_ROLES)}")
    if role == "assistant":
        return _read_assistant(fields, path, warnings)
    content = read_content(fields, "content", warnings)
    if content is None:
        fields.fail("content", f"is missing: a {role} message needs content")
    # A developer message is what newer clients call a system message.
    message = Message(
        role="system" if role == "developer" else role,
        content=content,
        tool_call_id=fields.required_text("tool_call_id") if role == "tool" else None,
        task=_read_task(fields, role or "") if role == "user" else None,
    )
    return Entry(message, path)


def _read_assistant(fields: Fields, path: str, warnings: list[str]) -> Entry:
    content = read_content(fields, "content", warnings)
    reasoning = fields.text("reasoning_content")
    if reasoning is None:
        reasoning = fields.text("reasoning")
    calls = [_read_call(call) for call in fields.objects("tool_calls")]
    if content is None and reasoning is None and not calls:
        content = fields.text("refusal")
    if content is None and reasoning is None and not calls:
        fields.fail("content", "is missing: an assistant message needs content or tool_calls")
    message = Message(
        role="assistant",
        content=content or "",
        reasoning=reasoning or "",
        tool_calls=calls,
        prefix=fields.boolean("prefix") or False,
        task=_read_task(fields, "assistant"),
    )
    return Entry(message, path, reasoning is not None)


def _read_task(fields: Fields, role: str) -> str | None:
    """A quick instruction, which the model answers at once: an addition of this project."""
    names = tuple(name for name, task in TASKS.items() if task.role == role)
    return fields.choice("task", names)


def _read_call(call: Fields) -> ToolCall:
    call_id = call.required_text("id")
    kind = cast('Literal["function", "custom"]', call.choice("type", ("function", "custom")))
    inner = call.object(kind or "function")
    if inner is None:
        call.fail(kind or "function", "is missing: an object with the name of the tool")
    name = prompt_name(inner.required_text("name"), inner.text("namespace"))
    if kind == "custom":
        return ToolCall(id=call_id, name=name, arguments=_input(inner.text("input") or ""))
    arguments = inner.take("arguments")
    if as_mapping(arguments) is not None:
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is not None and not isinstance(arguments, str):
        inner.fail("arguments", "must be text: JSON of an object")
    return ToolCall(id=call_id, name=name, arguments=object_text(arguments or ""))


def _input(text: str) -> str:
    return json.dumps({"input": text}, ensure_ascii=False)

"""From messages to the prompt, byte for byte as the reference encoders make it.

`encode` returns the text. `encode_segments` returns the same text in pieces that say which
characters are special tokens, for the tokenizer, and which the model wrote, for training.

Paper: §5.1.1 (reasoning efforts, tool-call schema, interleaved thinking, quick instructions).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict, cast

from fathom.chat import protocol
from fathom.chat.dsml import render_calls
from fathom.chat.messages import Message, as_mapping, as_message
from fathom.chat.protocol import Revision, check_layout, check_thinking, find_revision
from fathom.chat.quick import find_task
from fathom.chat.segments import Segment, join_text, mark_own, merge_text
from fathom.chat.thinking import ThinkingRule, apply_thinking
from fathom.chat.turns import Turn, merge_messages, sort_tool_results
from fathom.errors import ChatError

AnyMessage = Message | Mapping[str, Any]


class PromptOptions(TypedDict, total=False):
    """The keyword arguments of `encode`, for functions that pass them on."""

    thinking: str
    revision: str
    drop_thinking: bool
    response_format: Any
    context: Sequence[AnyMessage]
    add_bos: bool
    open_calls: bool
    images: bool
    layout: str


def encode(
    messages: Sequence[AnyMessage],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: str = "high",
    revision: str = "0424",
    drop_thinking: bool = True,
    response_format: Any = None,
    *,
    context: Sequence[AnyMessage] = (),
    add_bos: bool = True,
    open_calls: bool = False,
    images: bool = False,
    layout: str = "reference",
) -> str:
    """Return the prompt for `messages`, which ends where the model goes on writing.

    Args:
        messages: dictionaries in OpenAI chat shape, or `Message` objects. A system or developer
            message may carry `tools` and `response_format` itself; a last assistant message with
            `prefix` is continued.
        tools: function schemas, put into the first system message (one is added if needed).
        thinking: "off", "low", "high" or "max".
        revision: the model version, "0424" (April) or "0731"; they differ in the effort prefix.
        drop_thinking: without tools, leave out the reasoning before the last user message.
        response_format: the object that replies must follow, put where `tools` go.
        context: messages whose prompt was made before; only what follows them is returned.
        add_bos: begin with the BOS token (never behind a context).
        open_calls: end with the opening of a tool-call block, so that the model must call.
        images: render image parts as the image token instead of naming them unsupported.
        layout: "reference" writes what the reference encoders write; "api" what the hosted API
            makes of a request, see docs/protocol.md. They differ only off the common path.

    Raises:
        ChatError: a message, tool, mode or revision that cannot be rendered.
    """
    return join_text(
        encode_segments(
            messages,
            tools,
            thinking,
            revision,
            drop_thinking,
            response_format,
            context=context,
            add_bos=add_bos,
            open_calls=open_calls,
            images=images,
            layout=layout,
        )
    )


def encode_segments(
    messages: Sequence[AnyMessage],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: str = "high",
    revision: str = "0424",
    drop_thinking: bool = True,
    response_format: Any = None,
    *,
    context: Sequence[AnyMessage] = (),
    add_bos: bool = True,
    open_calls: bool = False,
    images: bool = False,
    layout: str = "reference",
) -> list[Segment]:
    """Return the prompt of `encode` in segments; the arguments and errors are the same."""
    rules = find_revision(revision)
    check_thinking(thinking)
    check_layout(layout)
    if open_calls and thinking != "off":
        raise ChatError("open_calls needs thinking off: reasoning comes before calls")
    past = [as_message(message) for message in context]
    new = _attach(list(map(as_message, messages)), tools, response_format, may_add=not past)
    turns = sort_tool_results([*merge_messages(past, is_context=True), *merge_messages(new)])
    turns, rule = apply_thinking(turns, thinking, drop_thinking, answers_only=layout == "api")
    segments: list[Segment] = []
    if not past:
        segments += [_special(protocol.BOS)] if add_bos else []
        segments.append(Segment(rules.effort.get(thinking, "") if rule.enabled else ""))
    make = _ApiRenderer if layout == "api" else _Renderer
    renderer = make(revision=rules, rule=rule, images=images)
    for index, turn in enumerate(turns):
        if not turn.is_context:
            segments += renderer.turn(index, turns)
    segments += renderer.end(turns)
    if open_calls:
        segments += [Segment("\n\n<"), _special(protocol.DSML), Segment(f"{rules.tags.block}>\n")]
    return merge_text(segments)


def render(message: AnyMessage, thinking: str = "high", revision: str = "0424") -> str:
    """Return an assistant message as the model writes it behind the header, with EOS.

    The inverse of `parse`. Raises ChatError as `encode` does.
    """
    message = as_message(message)
    if message.role != "assistant":
        raise ChatError(f"only an assistant message is a completion, not one of {message.role}")
    check_thinking(thinking)
    body = _assistant(message, find_revision(revision), shows=thinking != "off")
    return join_text(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Renderer:
    revision: Revision
    rule: ThinkingRule
    images: bool
    blank_line: ClassVar[bool] = True  # an empty line where a call has no arguments

    def end(self, turns: list[Turn]) -> list[Segment]:
        """Return what follows the last turn."""
        return []

    def turn(self, index: int, turns: list[Turn]) -> list[Segment]:
        turn = turns[index]
        message = turn.message
        if turn.role == "latest_reminder":
            return [_special(protocol.LATEST_REMINDER), *self._content(message)]
        if turn.role == "system":
            return [*self._instructions(message), *self._instructions_end(index, turns)]
        if turn.role == "assistant":
            return self._assistant(index, turns)
        if turn.role == "developer":
            if not message.content:
                raise ChatError("a developer message must not be empty")
            body = self._instructions(message)
        else:
            body = self._blocks(turn)
        return [_special(protocol.USER), *body, *self._user_end(index, turns)]

    def _assistant(self, index: int, turns: list[Turn]) -> list[Segment]:
        message = turns[index].message
        answers_task = index > 0 and turns[index - 1].message.task is not None
        shows = self.rule.shows(index) and not answers_task
        body = _assistant(message, self.revision, shows=shows, blank_line=self.blank_line)
        segments = [segment._replace(generated=True) for segment in body]
        task = find_task(message.task, "assistant")
        return [*segments, _special(task.token)] if task else segments

    def _instructions_end(self, index: int, turns: list[Turn]) -> list[Segment]:
        opens = index == len(turns) - 1 and self.revision.opens_after_system
        return self._header(index) if opens else []

    def _user_end(self, index: int, turns: list[Turn]) -> list[Segment]:
        task = find_task(turns[index].message.task, "user")
        following = turns[index + 1].role if index + 1 < len(turns) else "assistant"
        if following not in ("assistant", "latest_reminder"):
            return []  # nothing is asked of the model here, not even by a task
        if task and not task.header:
            return [_special(task.token)]
        header = self._header(index)
        return [*header, _special(task.token)] if task else header

    def _header(self, index: int) -> list[Segment]:
        opens = self.rule.opens(index)
        think = protocol.THINK if opens else protocol.THINK_END
        return [_special(protocol.ASSISTANT), _special(think)]

    def _blocks(self, turn: Turn) -> list[Segment]:
        segments: list[Segment] = []
        for at, block in enumerate(turn.blocks):
            if at:
                segments.append(Segment("\n\n"))
            if block.role == "tool":
                before, after = protocol.TOOL_RESULT
                segments += [Segment(before), *self._content(block), Segment(after)]
            else:
                segments += self._content(block)
                if block.extracted_url is not None:
                    segments += [_special(protocol.EXTRACTED_URL), Segment(block.extracted_url)]
        return segments

    def _content(self, message: Message) -> list[Segment]:
        if isinstance(message.content, str):
            return [Segment(message.content)]
        segments: list[Segment] = []
        for at, part in enumerate(message.content):
            if at:
                segments.append(Segment("\n\n"))
            segments.append(self._part(part, message.role))
        return segments

    def _part(self, part: Mapping[str, Any], role: str) -> Segment:
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise ChatError(f"a text part of a {role} message has no text")
            return Segment(text)
        if kind == "image_url" and self.images:
            return _special(protocol.IMAGE)
        return Segment(f"[Unsupported {kind}]")

    def _format(self, response_format: Any) -> str:
        return protocol.RESPONSE_FORMAT_HEAD + _json(response_format, "response_format")

    def _instructions(self, message: Message) -> list[Segment]:
        segments = self._content(message)
        if message.tools:
            segments += [Segment("\n\n"), *_tools_section(message.tools, self.revision)]
        if message.response_format:
            segments.append(Segment("\n\n" + self._format(message.response_format)))
        return segments


class _ApiRenderer(_Renderer):
    """Puts the header before each answer instead of behind each question.

    So an answer always has one, whatever stands before it, and the prompt always ends with one
    unless the last message is continued.
    """

    blank_line: ClassVar[bool] = False

    def end(self, turns: list[Turn]) -> list[Segment]:
        if turns:
            last = turns[-1].message
            if last.prefix or last.task is not None:
                return []
        return self._header(len(turns))

    def turn(self, index: int, turns: list[Turn]) -> list[Segment]:
        if turns[index].role != "assistant" or (index and turns[index - 1].message.task):
            return super().turn(index, turns)
        # An answer whose reasoning is left out had none to begin with.
        think = protocol.THINK if self.rule.shows(index) else protocol.THINK_END
        return [_special(protocol.ASSISTANT), _special(think), *super().turn(index, turns)]

    def _format(self, response_format: Any) -> str:
        if response_format == protocol.JSON_OBJECT_FORMAT:
            return protocol.JSON_OBJECT_TEXT
        return super()._format(response_format)

    def _user_end(self, index: int, turns: list[Turn]) -> list[Segment]:
        return super()._user_end(index, turns) if turns[index].message.task else []

    def _instructions_end(self, index: int, turns: list[Turn]) -> list[Segment]:
        return []


def _assistant(
    message: Message, revision: Revision, *, shows: bool, blank_line: bool = True
) -> list[Segment]:
    content = message.content
    if not isinstance(content, str):
        content = "\n\n".join(str(part.get("text", "")) for part in content)
    segments: list[Segment] = []
    if shows:
        segments.append(Segment(message.reasoning))
        # A continued message with reasoning alone is still inside its thoughts.
        has_begun = bool(message.reasoning) or not blank_line  # as hosted: an empty one begins here
        is_open = message.prefix and has_begun and not content and not message.tool_calls
        if not is_open:
            segments.append(_special(protocol.THINK_END))
    segments.append(Segment(content))
    if message.tool_calls:
        segments += [Segment("\n\n"), *render_calls(message.tool_calls, revision, blank_line)]
    return segments if message.prefix else [*segments, _special(protocol.EOS)]


def _attach(
    messages: list[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    response_format: Any,
    *,
    may_add: bool,
) -> list[Message]:
    """Put `tools` and `response_format` into the first system message."""
    if not tools and not response_format:
        return messages
    if not may_add:
        raise ChatError("tools behind a context: put them on the context's system message instead")
    at = next((i for i, message in enumerate(messages) if message.role == "system"), None)
    if at is None:
        messages, at = [Message(role="system"), *messages], 0
    system = messages[at]
    if (tools and system.tools) or (response_format and system.response_format):
        raise ChatError("tools or response_format given twice: as argument and on the message")
    messages[at] = replace(
        system,
        tools=cast("list[dict[str, Any]]", list(tools)) if tools else system.tools,
        response_format=response_format or system.response_format,
    )
    return messages


def _tools_section(tools: Iterable[Mapping[str, Any]], revision: Revision) -> list[Segment]:
    tags = revision.tags
    head = protocol.TOOLS_HEAD
    for name, value in (
        ("{D}", protocol.DSML),
        ("{block}", tags.block),
        ("{invoke}", tags.invoke),
        ("{parameter}", tags.parameter),
    ):
        head = head.replace(name, value)
    schemas = "\n".join(_json(_function(tool), "tools") for tool in tools)
    return [*mark_own(head), Segment(schemas), Segment(protocol.TOOLS_TAIL)]


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    fields = as_mapping(tool) or {}
    function = as_mapping(fields.get("function", fields))
    if function is None or not isinstance(function.get("name"), str):
        raise ChatError("a tool needs a function with a name: see the OpenAI chat shape")
    return function


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{what} cannot be written as JSON: {error}") from None


def _special(token: str) -> Segment:
    return Segment(token, special=True)

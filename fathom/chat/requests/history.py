"""What the three APIs' conversations have in common once their messages are read.

`Entry` pairs a message with the name of the field it came from, so that a check over the whole
conversation can still say where it failed.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fathom.chat.dsml import fits_tag, refuse_constant
from fathom.chat.messages import Message
from fathom.chat.protocol import SYSTEM_REMINDER
from fathom.chat.requests.types import RequestOptions
from fathom.errors import RequestError

BLANK = "\n\n"


class Entry(NamedTuple):
    """A message and the field that it came from. `reasoned`: it had a reasoning field."""

    message: Message
    path: str
    reasoned: bool = True


def object_text(arguments: str) -> str:
    """Return the arguments of a past call as JSON of an object.

    Text that is none, which a model or a cut may have left, becomes one argument of its own, so
    that the model sees what it wrote and no client fails for it.
    """
    try:
        value = json.loads(arguments, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return arguments
    return json.dumps({"arguments": arguments}, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A checked conversation: `messages` for the prompt, `carried` before they were settled."""

    messages: list[Message]
    carried: list[Message]
    restored: int


def finish_conversation(
    entries: list[Entry], options: RequestOptions, *, instructions: str = "", field: str
) -> Conversation:
    """Check the order of a conversation and settle its system messages.

    Raises RequestError for an empty conversation (about `field`), for results that do not answer
    exactly the calls before them, and for a continued message that is not the last.
    """
    if not entries:
        raise RequestError("must hold at least one message", field)
    _check_results(entries)
    for message, path, _ in entries:
        for call in message.tool_calls:
            if not fits_tag(call.name):
                raise RequestError(f"calls {call.name!r:.100}, which is no name of a tool", path)
    for message, path, _ in entries[:-1]:
        if message.prefix:
            raise RequestError("only the last message can be continued", f"{path}.prefix")
    carried = [_recall(entry, options) for entry in entries]
    restored = sum(
        message is not entry.message for message, entry in zip(carried, entries, strict=True)
    )
    front = [Message(role="system", content=instructions)] if instructions else []
    settled = _join_questions(_settle_system([*front, *carried], hoist=options.hoist_system))
    return Conversation(messages=settled, carried=carried, restored=restored)


def _recall(entry: Entry, options: RequestOptions) -> Message:
    """Return the message, with the reasoning that the client lost if somebody knows it."""
    message = entry.message
    if not message.tool_calls or message.reasoning:
        return message
    if options.recall is not None:
        for call in message.tool_calls:
            reasoning = options.recall(call.id)
            if reasoning:
                return replace(message, reasoning=reasoning)
    if options.require_reasoning and not entry.reasoned:
        raise RequestError(
            "is missing: reasoning must be passed back with tool calls",
            f"{entry.path}.reasoning_content",
        )
    return message


def _check_results(entries: list[Entry]) -> None:
    """Check that each assistant message with calls is followed by one result for each of them."""
    open_ids: dict[str, bool] = {}
    path_of_calls = ""
    for message, path, _ in entries:
        if message.role == "tool":
            _take_result(open_ids, message.tool_call_id or "", path)
            continue
        _check_answered(open_ids, path_of_calls)
        open_ids = {}
        for at, call in enumerate(message.tool_calls):
            if call.id in open_ids:
                raise RequestError(
                    f"{call.id!r} is the id of another call too", f"{path}.tool_calls[{at}].id"
                )
            open_ids[call.id] = False
        path_of_calls = path
    _check_answered(open_ids, path_of_calls)


def _take_result(open_ids: dict[str, bool], call_id: str, path: str) -> None:
    answered = open_ids.get(call_id)
    if answered is not False:
        what = "was answered already" if answered else "is not among the calls just before it"
        raise RequestError(f"call {call_id!r} {what}", f"{path}.tool_call_id")
    open_ids[call_id] = True


def _check_answered(open_ids: dict[str, bool], path: str) -> None:
    missing = [call_id for call_id, answered in open_ids.items() if not answered]
    if missing:
        raise RequestError(
            f"calls without a result right behind them: {', '.join(missing)}", f"{path}.tool_calls"
        )


def _settle_system(messages: list[Message], *, hoist: bool) -> list[Message]:
    """Join the system messages at the front, and put later ones where they can stay.

    A later one becomes a marked block of the user turn. Moving it to the front instead would
    change a prompt that was already computed.
    """
    front: list[Message] = []
    rest: list[Message] = []
    for message in messages:
        if message.role != "system":
            rest.append(message)
        elif hoist or not rest:
            front.append(message)
        else:
            before, after = SYSTEM_REMINDER
            text = before + join_content(message.content) + after
            rest.append(replace(message, role="user", content=text))
    if not front:
        return rest
    texts = [join_content(message.content) for message in front]
    text = BLANK.join(text for text in texts if text)
    return [replace(front[0], content=text), *rest]


def _join_questions(messages: list[Message]) -> list[Message]:
    """Join user messages in a row, leaving out the empty ones, as the hosted API does.

    A message with a task ends its turn, because the model answers at its token.
    """
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        follows = last is not None and last.role == "user" and last.task is None
        if message.role == "user" and last is not None and follows:
            texts = (join_content(last.content), join_content(message.content))
            content = BLANK.join(text for text in texts if text)
            joined[-1] = replace(last, content=content, task=message.task)
        else:
            joined.append(message)
    return joined


def join_content(content: str | list[dict[str, Any]]) -> str:
    """Return content as one text."""
    if isinstance(content, str):
        return content
    return BLANK.join(str(part.get("text", "")) for part in content)

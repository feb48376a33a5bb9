"""The three APIs' request bodies, read into one form.

`read_chat`, `read_messages` and `read_responses` take a decoded JSON body and return a
`PromptRequest`, which renders its prompt (`prompt()`, `segments()`) and makes its parser
(`parser()`). They are pure: no clock, no store, no network. A body that cannot be served raises
RequestError, whose `param` names the field, such as `messages[2].tool_call_id`.

What a client must get back later is made here too: `pack_reasoning` and `sign_reasoning` give the
opaque texts that carry reasoning through clients which return nothing else.

Paper: none (the APIs are DeepSeek's, OpenAI's and Anthropic's, not the paper's).
"""

from __future__ import annotations

from fathom.chat.requests.carrier import pack_reasoning, sign_reasoning, unpack_reasoning
from fathom.chat.requests.chat import read_chat
from fathom.chat.requests.effort import resolve_effort
from fathom.chat.requests.messages import read_messages
from fathom.chat.requests.responses import read_responses
from fathom.chat.requests.types import (
    MOST_TOKENS,
    Grammar,
    PromptRequest,
    RequestOptions,
    ResponseFormat,
    ToolChoice,
    ToolSpec,
)

__all__ = [
    "MOST_TOKENS",
    "Grammar",
    "PromptRequest",
    "RequestOptions",
    "ResponseFormat",
    "ToolChoice",
    "ToolSpec",
    "pack_reasoning",
    "read_chat",
    "read_messages",
    "read_responses",
    "resolve_effort",
    "sign_reasoning",
    "unpack_reasoning",
]

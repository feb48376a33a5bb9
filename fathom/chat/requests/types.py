"""What a request asks for, the same whichever of the three APIs it came through.

`PromptRequest` holds the conversation and every wish that shapes the prompt, the parser or the
sampling. It renders its own prompt and makes the parser that fits, so nobody has to carry the
matching settings from one to the other.

Paper: none (the APIs are DeepSeek's, OpenAI's and Anthropic's, not the paper's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fathom.chat.encode import encode_segments
from fathom.chat.generation import Shaping
from fathom.chat.messages import Message
from fathom.chat.protocol import JSON_OBJECT_FORMAT
from fathom.chat.reply import Sampling
from fathom.chat.segments import Segment, join_text
from fathom.chat.stream import StreamParser

Api = Literal["chat", "messages", "responses"]
ToolKind = Literal["function", "custom", "tool_search"]

MOST_TOKENS = (
    393_216  # the largest max_tokens of the hosted API, and the context floor of Think Max
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How requests are read where the APIs leave a choice.

    Args:
        revision: the model version whose prompts are made, "0424" or "0731".
        default_effort: the effort of a request that names none; "none" turns thinking off.
        hoist_system: move every system message to the front, as the hosted Chat API does. By
            default a later one stays where it is, so that a prompt never changes behind the
            client's back.
        keep_tools_when_none: with tool_choice "none" keep the tools in the prompt (for a server
            that can forbid the model to call); by default they are left out, as hosted.
        require_reasoning: refuse an assistant message with calls but without a reasoning field,
            as the hosted API does; by default the reasoning counts as empty.
        most_choices: the largest `n`.
        recall: gives the reasoning that led to a call, by the id of the call, or None; asked when
            a client sends calls back without the reasoning before them.
    """

    revision: str = "0731"
    default_effort: str = "high"
    hoist_system: bool = False
    keep_tools_when_none: bool = False
    require_reasoning: bool = False
    most_choices: int = 8
    recall: Callable[[str], str | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """The grammar that the input of a custom tool follows: `syntax` is "lark" or "regex"."""

    syntax: str
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool as the prompt shows it, and the way back to how the client declared it.

    `name` is what the model writes. A tool of a namespace is called `namespace__local_name` there;
    an answer must carry `namespace` and `local_name` apart. A "custom" tool has one string argument
    named `input`, which is the text to return.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False
    kind: ToolKind = "function"
    local_name: str = ""
    namespace: str | None = None
    grammar: Grammar | None = None

    def schema(self) -> dict[str, Any]:
        """Return what the prompt says about the tool."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether the model may, must or must not call, and what: no `names` means any tool."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """The form that the content must have."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: Any = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One request, read and checked.

    `tools` are those that the prompt shows, `found_tools` those that an earlier search brought: the
    model knows them from its result. `carried` are the messages that a later request of the same
    conversation builds on (Responses: all but the instructions); `restored` says in how many of
    them the reasoning was recalled. `thinking` is the mode of the prompt and `effort` the
    word that the client used for it, None if it used none. `top_logprobs` is None without
    logprobs. `warnings` say in a sentence each what was ignored. `metadata` is everything that
    concerns the caller's records and not the model: user, metadata, store, cache keys, billing
    lines.
    """

    api: Api
    model: str | None
    messages: list[Message]
    carried: list[Message]
    restored: int
    tools: list[ToolSpec]
    found_tools: list[ToolSpec]
    tool_choice: ToolChoice
    thinking: str
    effort: str | None
    response_format: ResponseFormat
    stop: tuple[str, ...]
    sampling: Sampling
    shaping: Shaping
    max_tokens: int | None
    n: int
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    stream_arguments: bool | None
    previous_response_id: str | None
    metadata: Mapping[str, Any]
    warnings: tuple[str, ...]
    revision: str

    @property
    def prefix(self) -> bool:
        """Whether the model goes on with the last message instead of answering it."""
        return bool(self.messages) and self.messages[-1].prefix

    @property
    def opens_calls(self) -> bool:
        """Whether the prompt itself opens the block of calls: a call is required, no thought."""
        free = not self.prefix and self.task is None
        return self.tool_choice.mode == "required" and self.thinking == "off" and free

    @property
    def task(self) -> str | None:
        """The quick instruction that is answered, None without one."""
        return self.messages[-1].task if self.messages else None

    @property
    def start(self) -> Literal["reasoning", "content", "tool_calls"]:
        """The stage in which the completion begins."""
        if self.opens_calls:
            return "tool_calls"
        if self.thinking == "off" or self.task is not None:
            return "content"
        if self.prefix and self.messages[-1].content:
            return "content"
        return "reasoning"

    @property
    def reasons(self) -> bool:
        """Whether the completion begins inside the thoughts."""
        return self.start == "reasoning"

    def find_tool(self, name: str) -> ToolSpec | None:
        """Return the tool that the model calls `name`."""
        known = (*self.tools, *self.found_tools)
        return next((tool for tool in known if tool.name == name), None)

    def default_max_tokens(self) -> int:
        """Return how many tokens the hosted API generates at most when the request says nothing."""
        if self.thinking == "off":
            return 8_192
        return 131_072 if self.thinking == "max" else 65_536

    def default_sampling(self) -> Sampling:
        """Return the sampling with the hosted API's values where the request gives none."""
        thinks_with_tools = self.thinking != "off" and bool(self.tools)
        asked = self.sampling
        return Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=(0.95 if thinks_with_tools else 1.0) if asked.top_p is None else asked.top_p,
            seed=asked.seed,
        )

    def segments(self) -> list[Segment]:
        """Return the prompt in segments, for `Tokenizer.encode_segments`.

        Raises ChatError for what cannot be rendered, such as a tool name that breaks a tag.
        """
        return encode_segments(
            self.messages,
            [tool.schema() for tool in self.tools],
            self.thinking,
            self.revision,
            response_format=self._format(),
            open_calls=self.opens_calls,
            layout="api",
        )

    def prompt(self) -> str:
        """Return the prompt as text. Raises ChatError as `segments` does."""
        return join_text(self.segments())

    def parser(
        self,
        *,
        make_id: Callable[[int], str] | None = None,
        stream_arguments: bool | None = None,
    ) -> StreamParser:
        """Return the parser of the completion.

        Calls are read as calls even where none is allowed, so that their markup never reaches the
        content; the caller looks at `tool_choice`. `stream_arguments` overrides the request.
        """
        if stream_arguments is None:
            stream_arguments = bool(self.stream_arguments)
        return StreamParser(
            self.thinking,
            start=self.start,
            trim=not self.prefix,
            make_id=make_id,
            stream_arguments=stream_arguments,
            stop=self.stop,
        )

    def _format(self) -> Any:
        if self.response_format.kind == "json_object":
            return JSON_OBJECT_FORMAT
        return self.response_format.schema

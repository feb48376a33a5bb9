"""The protocol as data: special tokens, tag names, effort prefixes and fixed prompt texts.

Nothing here acts. A new dialect (other tag names, other effort texts) is a new `Revision`, not new
code. The bar in most tokens is U+FF5C and the word separator U+2581.

Paper: §5.1.1 (reasoning efforts, tool-call schema, quick instructions).
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.errors import ChatError

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "\uff5cDSML\uff5c"
LATEST_REMINDER = "<\uff5clatest_reminder\uff5c>"
IMAGE = "<\uff5cdeepseek_image\uff5c>"
EXTRACTED_URL = "<\uff5cextracted_url\uff5c>"

# Short name -> token text. The order is the order of ids in a tokenizer that we train: the first
# three are fixed by the model configuration (bos 0, eos 1, pad 2).
SPECIAL_TOKENS: dict[str, str] = {
    "bos": BOS,
    "eos": EOS,
    "pad": PAD,
    "user": USER,
    "assistant": ASSISTANT,
    "think": THINK,
    "think_end": THINK_END,
    "dsml": DSML,
    "latest_reminder": LATEST_REMINDER,
    "action": "<\uff5caction\uff5c>",
    "query": "<\uff5cquery\uff5c>",
    "authority": "<\uff5cauthority\uff5c>",
    "domain": "<\uff5cdomain\uff5c>",
    "title": "<\uff5ctitle\uff5c>",
    "extracted_url": EXTRACTED_URL,
    "read_url": "<\uff5cread_url\uff5c>",
    "fim_hole": "<\uff5cfim\u2581hole\uff5c>",
    "fim_begin": "<\uff5cfim\u2581begin\uff5c>",
    "fim_end": "<\uff5cfim\u2581end\uff5c>",
    "end_of_query": "<\uff5cend_of_query\uff5c>",
    "search_begin": "<\uff5csearch\u2581begin\uff5c>",
    "search_end": "<\uff5csearch\u2581end\uff5c>",
}

# Of the model's vocabulary, but of no use here. In a prompt that goes out as text, where a reader
# would take them for tokens, data must not spell them either.
UNUSED_TOKENS: tuple[str, ...] = ("<|EOT|>", "<dsml:")

TOOL_RESULT = ("<tool_result>", "</tool_result>")

RESPONSE_FORMAT_HEAD = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)

# Stands for any JSON object as response_format, for which the API has a text of its own.
JSON_OBJECT_FORMAT = {"type": "json_object"}
JSON_OBJECT_TEXT = (
    "You are a helpful assistant designed to output JSON.\n## Response Format:\n\n"
    "Reply with JSON object ONLY."
)

SYSTEM_REMINDER = ("<system-reminder>\n", "\n</system-reminder>")

EFFORT_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)

EFFORT_BEYOND = (
    "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple "
    "angles and are certain that no assumption remains unchecked and no error remains "
    "undiscovered.\n\n"
)

# {D} is the marker token, {block} {invoke} {parameter} the tag names.
TOOLS_HEAD = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{D}{block}>" block like the following:

<{D}{block}>
<{D}{invoke} name="$TOOL_NAME">
<{D}{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}{parameter}>
...
</{D}{invoke}>
<{D}{invoke} name="$TOOL_NAME2">
...
</{D}{invoke}>
</{D}{block}>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning \
inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""

TOOLS_TAIL = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)

THINKING_MODES = ("off", "low", "high", "max")
LAYOUTS = ("reference", "api")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """Names of the three DSML tags."""

    block: str = "tool_calls"
    invoke: str = "invoke"
    parameter: str = "parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """Everything in which one model version's prompts differ from another's.

    `effort` maps a thinking mode to the text directly after BOS. `opens_after_system`: a
    conversation that ends with its system message still gets an assistant header.
    `strict_arguments`: past calls whose arguments are not JSON are refused; otherwise their text
    becomes one string parameter named `arguments`.
    """

    name: str
    effort: dict[str, str]
    opens_after_system: bool
    strict_arguments: bool
    tags: Tags = Tags()


REVISIONS: dict[str, Revision] = {
    "0424": Revision(
        name="0424",
        effort={"max": EFFORT_ABSOLUTE},
        opens_after_system=False,
        strict_arguments=False,
    ),
    "0731": Revision(
        name="0731",
        effort={"high": EFFORT_ABSOLUTE, "max": EFFORT_BEYOND},
        opens_after_system=True,
        strict_arguments=True,
    ),
}


def find_revision(name: str) -> Revision:
    """Return the revision called `name`. Raises ChatError for an unknown one."""
    try:
        return REVISIONS[name]
    except KeyError:
        known = ", ".join(REVISIONS)
        raise ChatError(f"unknown protocol revision {name!r}: use one of {known}") from None


def check_thinking(thinking: str) -> str:
    """Return `thinking` if it is a mode. Raises ChatError otherwise."""
    if thinking not in THINKING_MODES:
        raise ChatError(f"unknown thinking mode {thinking!r}: use off, low, high or max")
    return thinking


def check_layout(layout: str) -> str:
    """Return `layout` if it is one. Raises ChatError otherwise."""
    if layout not in LAYOUTS:
        raise ChatError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    return layout

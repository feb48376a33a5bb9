"""Messages, texts and hypothesis strategies that several chat tests use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from fathom.chat import Event, Message, StreamParser, ToolCall
from fathom.chat.protocol import DSML, EOS, SPECIAL_TOKENS, THINK, THINK_END, USER

PROSE = """The quick brown fox reads "/work/src/main_file.py" and says: it's 42, isn't it?
    def count(path): return len(open(path).read().split("\\n"))  # 1234567890
\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \u4e16\u754c! \U0001f980
"""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run a command.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
            },
        },
    }
]


def call(name: str = "bash", call_id: str = "", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def conversation() -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many files are there?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "reasoning_content": "I count them.",
            "tool_calls": [call(call_id="a", command="ls | wc -l")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "12\n"},
        {"role": "assistant", "content": "There are 12.", "reasoning_content": "12 it is."},
        {"role": "user", "content": "Thanks."},
    ]


def block(*invokes: str, name: str = "tool_calls") -> str:
    """A DSML block around `invokes`, with the line breaks before it."""
    inside = "\n".join(invokes)
    return f"\n\n<{DSML}{name}>\n{inside}\n</{DSML}{name}>"


def invoke(name: str, *parameters: str) -> str:
    inside = "\n".join(parameters)
    return f'<{DSML}invoke name="{name}">\n{inside}\n</{DSML}invoke>'


def parameter(key: str, value: str, string: str = "true") -> str:
    return f'<{DSML}parameter name="{key}" string="{string}">{value}</{DSML}parameter>'


def read_stream(
    pieces: Iterable[str], thinking: str = "high", **options: Any
) -> tuple[Message, list[Event]]:
    parser = StreamParser(thinking, **{"stream_arguments": True} | options)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.close()
    return parser.message, events


def is_clean(message: Message) -> bool:
    return not message.diagnostics and not any(
        call.repaired or call.partial for call in message.tool_calls
    )


# What a model writes when it gets the markup wrong: pieces of tags between words that can be found
# again in the result.
MARKUP = [
    DSML,
    f"<{DSML}",
    f"</{DSML}",
    f"<{DSML}tool_calls>",
    f"</{DSML}tool_calls>",
    f"<{DSML}function_calls>",
    f'<{DSML}invoke name="f">',
    f"<{DSML}invoke name='g'>",
    f'<{DSML}invoke name="h"/>',
    f"<{DSML}invoke>",
    f"</{DSML}invoke>",
    f'<{DSML}parameter name="a" string="true">',
    f'<{DSML}parameter name="b" string="false">',
    f'<{DSML}parameter name="c">',
    f'<{DSML}parameter string="true" name="d">',
    f"<{DSML}parameter",
    f"</{DSML}parameter>",
    THINK,
    THINK_END,
    EOS,
    "<",
    "</",
    ">",
    '"',
    "{",
    '{"k": [1]}',
    "5",
    "\n",
    "\n\n",
    " ",
    "\uff5c",
    "</thi",
]

SPECIAL_TEXTS = [*SPECIAL_TOKENS.values(), USER.lower(), "<tool_result>", "</tool_result>"]

_IN_CALL = f'{THINK_END}\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
OPENINGS = [
    "",
    THINK_END,
    f"{THINK_END}C\n\n<{DSML}tool_calls>\n",
    _IN_CALL,
    f'{_IN_CALL}<{DSML}parameter name="p" string="true">',
    f'{_IN_CALL}<{DSML}parameter name="q" string="false">',
    f'{_IN_CALL}<{DSML}parameter name="r',
]
_pieces = st.sampled_from(MARKUP) | st.integers(0, 99).map("w{};".format)
# Random tags seldom get as far as a value by themselves, so some texts begin there.
soup = st.builds(
    lambda opening, pieces: opening + "".join(pieces),
    st.sampled_from(OPENINGS),
    st.lists(_pieces, max_size=25),
)
hostile_text = st.lists(st.sampled_from([*SPECIAL_TEXTS, *MARKUP]) | st.text(max_size=4)).map(
    "".join
)


def _is_plain(text: str) -> bool:
    return THINK_END not in text and f"<{DSML}" not in text


# Reasoning and content may hold anything but what ends them; the reference refuses more.
prose = hostile_text.filter(_is_plain)
names = st.from_regex(r"[A-Za-z0-9_\-]{1,12}", fullmatch=True) | st.sampled_from(
    ["\u67e5\u8be2", "a b"]
)
keys = hostile_text.filter(lambda key: DSML not in key and "string=" not in key)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
arguments = st.dictionaries(keys, hostile_text | values, max_size=4)
tool_calls = st.lists(
    st.builds(
        lambda name, values: ToolCall(
            name=name, arguments=json.dumps(values, ensure_ascii=False), id="any"
        ),
        names,
        arguments,
    ),
    max_size=3,
)
assistant_messages = st.builds(
    lambda reasoning, content, calls: Message(
        reasoning=reasoning, content=content, tool_calls=calls
    ),
    prose,
    prose,
    tool_calls,
)

"""A script that plays through a session with an agent, told what to do by marks in the messages.

    [[plain]]  an answer             [[two]]    two rounds of calls, then an answer
    [[one]]    one call, an answer   [[par]]    two calls at once, then an answer
    [[empty]]  a call without arguments         [[slow]]   a long answer, to be cancelled

Everything else gets a short answer. The last mark in a user's text counts, and the rounds since.
A harness whose prompt asks for a command that ends its task gets that command with the answer.

Paper: none (testing).
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from fathom.chat.dsml import render_calls
from fathom.chat.messages import ToolCall
from fathom.chat.protocol import ASSISTANT, DSML, REVISIONS, THINK, TOOLS_TAIL, USER
from fathom.chat.segments import join_text
from fathom.server.scripted import Reply

_MARK = re.compile(r"\[\[(plain|one|two|par|empty|slow)\]\]")
_ROUNDS = {"one": 1, "two": 2, "par": 1, "empty": 1}
_SCHEMAS = "### Available Tool Schemas\n\n"
_FORMAT = "## Response Format:\n\n"
_FIRST = ("Bash", "bash", "shell_command", "exec_command", "shell", "run_shell_command",
          "list_directory", "ls", "glob")  # fmt: skip
_SECOND = ("Read", "read", "read_file", *_FIRST)
_RESULT = "<tool_result>"
_SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


class Session:
    """The script. `tools` names those to prefer; `delay` slows down the answer to [[slow]]."""

    def __init__(self, *, tools: tuple[str, ...] = (), delay: float = 0.05) -> None:
        self._preferred = tools
        self._delay = delay

    def __call__(self, prompt: str) -> Reply:
        """What follows this prompt."""
        thinks = prompt.endswith(THINK)
        mark, rounds = _state(prompt)
        tools = _tools(prompt)
        opens = prompt.endswith(f"<{DSML}tool_calls>\n")
        wanted = _ROUNDS.get(mark or "", 0)
        if opens or (rounds < wanted and tools):
            second = rounds == 1
            names = [self._choose(tools, second)]
            if mark == "par":
                names.append(self._choose(tools, True))
            thought = f"Round {rounds + 1}: I should look with a tool. \u03a9mega."
            filled = [_fill(tools[name], at + rounds > 0) for at, name in enumerate(names)]
            calls = [
                ToolCall(name=name, arguments="{}" if mark == "empty" else arguments)
                for name, arguments in zip(names, filled, strict=True)
            ]
            text = join_text(render_calls(calls, REVISIONS["0424"]))
            if opens:
                return Reply(text=text.split("\n", 1)[1])
            before = "Let me look." if not rounds else ""
            return Reply(text=_thought(thinks, thought) + f"{before}\n\n{text}")
        if mark == "slow":
            text = _thought(thinks, "word " * 200) + "slow " * 400
            return Reply(text=text, delay=self._delay)
        text = self._answer(prompt, mark, thinks)
        if mark and _SUBMIT in prompt and tools:
            text += f"\n\n{self._submit(tools)}"
        return Reply(text=text)

    def _submit(self, tools: dict[str, Any]) -> str:
        call = ToolCall(name=self._choose(tools, False), arguments=json.dumps({"command": _SUBMIT}))
        return join_text(render_calls([call], REVISIONS["0424"]))

    def _answer(self, prompt: str, mark: str | None, thinks: bool) -> str:
        schema = _response_schema(prompt)
        if schema is not None:
            return _thought(thinks, "They want JSON.") + json.dumps(_example(schema))
        if mark == "plain":
            return _thought(thinks, "2 + 2 is 4.") + "The answer is 4."
        if mark in _ROUNDS:
            done = "Done. The folder holds notes.txt and it says: the colour is blue \u2014 \u2713."
            return _thought(thinks, "I have the results and can answer.") + done
        return _thought(thinks, "A short side request.") + "Short title"

    def _choose(self, tools: dict[str, Any], second: bool) -> str:
        preferred = (*self._preferred, *(_SECOND if second else _FIRST))
        return next((name for name in preferred if name in tools), next(iter(tools)))


def _thought(thinks: bool, text: str) -> str:
    return f"{text}</think>" if thinks else ""


def _state(prompt: str) -> tuple[str | None, int]:
    """The last mark that a user wrote, and the assistant turns with calls behind it."""
    mark, rounds = None, 0
    for turn in prompt.split(USER)[1:]:
        said, _, answer = turn.partition(ASSISTANT)
        found = _MARK.findall(re.sub(rf"{_RESULT}.*?</tool_result>", "", said, flags=re.DOTALL))
        if found:
            mark, rounds = found[-1], 0
        rounds += f"<{DSML}tool_calls>" in answer and f"</{DSML}tool_calls>" in answer
    return mark, rounds


def _tools(prompt: str) -> dict[str, Any]:
    _, _, rest = prompt.partition(_SCHEMAS)
    lines = rest.partition(TOOLS_TAIL)[0].split("\n")
    schemas = [json.loads(line) for line in lines if line.startswith("{")]
    return {schema["name"]: schema.get("parameters") or {} for schema in schemas}


def _fill(schema: Any, second: bool) -> str:
    """Plausible arguments: what is required, and a command if one can be given."""
    properties = cast("dict[str, Any]", schema.get("properties") or {})
    arguments: dict[str, Any] = {}
    for name, form in properties.items():
        command = "cat notes.txt" if second else "ls -la"
        if name.lower() in ("command", "cmd"):
            arguments[name] = ["bash", "-c", command] if form.get("type") == "array" else command
        elif name not in (schema.get("required") or []):
            continue
        elif name.lower() in ("file_path", "filepath", "absolute_path", "path"):
            arguments[name] = "notes.txt"
        else:
            arguments[name] = _example(form)
    return json.dumps(arguments, ensure_ascii=False)


def _response_schema(prompt: str) -> Any:
    """The schema in the prompt's format section, None without one."""
    _, found, rest = prompt.partition(_FORMAT)
    if not found:
        return None
    start = rest.find("{")
    if start < 0:
        return {"type": "object"}
    try:
        return json.JSONDecoder().raw_decode(rest[start:])[0]
    except ValueError:
        return {"type": "object"}


def _example(schema: Any) -> Any:
    """The plainest value that fits a schema of the usual kinds."""
    if not isinstance(schema, dict):
        return None
    form = cast("dict[str, Any]", schema)
    if "enum" in form:
        return form["enum"][0]
    if "const" in form:
        return form["const"]
    for name in ("anyOf", "oneOf", "allOf"):
        if form.get(name):
            return _example(form[name][0])
    kind = form.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in form:
        properties = cast("dict[str, Any]", form.get("properties") or {})
        required = form.get("required") or list(properties)
        return {name: _example(properties[name]) for name in properties if name in required}
    plain = {"integer": 1, "number": 1, "boolean": False, "array": [], "null": None}
    return plain.get(kind or "string", "Short title")

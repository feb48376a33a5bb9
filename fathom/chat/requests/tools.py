"""Tools and the choice among them, as each API declares them.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from fathom.chat.messages import as_mapping
from fathom.chat.requests.fields import Fields
from fathom.chat.requests.types import Grammar, ToolChoice, ToolKind, ToolSpec
from fathom.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,256}")
_SEPARATOR = "__"
_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole input, as it is."}},
    "required": ["input"],
    "additionalProperties": False,
}


def prompt_name(local_name: str, namespace: str | None) -> str:
    """Return what the model calls a tool."""
    return f"{namespace}{_SEPARATOR}{local_name}" if namespace else local_name


class ToolReader:
    """Collects the tools of a request. What cannot be offered is left out with a warning."""

    def __init__(self, warnings: list[str]) -> None:
        self.tools: list[ToolSpec] = []
        self._warnings = warnings
        self._names: set[str] = set()

    def chat(self, tools: Iterable[Fields]) -> None:
        """Read the `tools` of Chat Completions."""
        for tool in tools:
            kind = tool.text("type") or "function"
            if kind == "function":
                inner = tool.object("function")
                if inner is None:
                    tool.fail("function", "is missing: an object with the name of the function")
                self._function(inner, "parameters")
            elif kind == "custom":
                inner = tool.object("custom")
                if inner is None:
                    tool.fail("custom", "is missing: an object with the name of the tool")
                self._custom(inner)
            else:
                self._leave_out(kind)

    def messages(self, tools: Iterable[Fields]) -> None:
        """Read the `tools` of Messages."""
        for tool in tools:
            kind = tool.text("type")
            if kind in (None, "custom"):
                self._function(tool, "input_schema", needs_object=True)
            else:
                self._leave_out(kind)

    def responses(self, tools: Iterable[Fields], namespace: str | None = None) -> None:
        """Read the `tools` of Responses, or those of a namespace in it."""
        for tool in tools:
            kind = tool.text("type")
            if kind == "function":
                self._function(tool, "parameters", needs_object=True, namespace=namespace)
            elif kind == "custom":
                self._custom(tool, namespace)
            elif kind == "namespace" and namespace is None:
                name = tool.required_text("name")
                self._check_name(tool, name)
                self.responses(tool.objects("tools"), name)
            elif kind == "tool_search" and tool.text("execution") == "client":
                self._function(tool, "parameters", kind="tool_search", name="tool_search")
            else:
                self._leave_out(kind)

    def _function(
        self,
        tool: Fields,
        schema_name: str,
        *,
        needs_object: bool = False,
        namespace: str | None = None,
        kind: ToolKind = "function",
        name: str | None = None,
    ) -> None:
        local_name = name or tool.required_text("name")
        schema = tool.take(schema_name)
        parameters = as_mapping(schema)
        if schema is not None and parameters is None:
            tool.fail(schema_name, "must be an object, a JSON Schema")
        parameters = parameters or {}
        declared = parameters.get("type")
        if declared != "object" and (needs_object or declared is not None):
            tool.fail(
                schema_name, f'must be a JSON Schema of type "object": its type is {declared!r}'
            )
        self._add(
            tool,
            ToolSpec(
                name=prompt_name(local_name, namespace),
                description=tool.text("description") or "",
                parameters=parameters,
                strict=tool.boolean("strict") or False,
                kind=kind,
                local_name=local_name,
                namespace=namespace,
            ),
        )

    def _custom(self, tool: Fields, namespace: str | None = None) -> None:
        local_name = tool.required_text("name")
        description = tool.text("description") or ""
        grammar = _read_grammar(tool)
        if grammar is not None:
            definition = grammar.definition.strip()
            description += f"\n\nThe input must follow this {grammar.syntax} grammar:\n{definition}"
        self._add(
            tool,
            ToolSpec(
                name=prompt_name(local_name, namespace),
                description=description.strip(),
                parameters=_INPUT,
                kind="custom",
                local_name=local_name,
                namespace=namespace,
                grammar=grammar,
            ),
        )

    def _add(self, tool: Fields, spec: ToolSpec) -> None:
        self._check_name(tool, spec.name)
        if spec.name in self._names:
            tool.fail("name", f"{spec.name!r} is the name of another tool too: names are unique")
        self._names.add(spec.name)
        self.tools.append(spec)

    def _check_name(self, tool: Fields, name: str) -> None:
        if not _NAME.fullmatch(name):
            tool.fail("name", f"{name!r} is no tool name: letters, digits, _ and - only")

    def _leave_out(self, kind: str | None) -> None:
        self._warnings.append(f"a tool of type {kind!r} was left out: this server has none")


def _read_grammar(tool: Fields) -> Grammar | None:
    form = tool.object("format")
    if form is None or form.text("type") != "grammar":
        return None
    inner = form.object("grammar") or form
    return Grammar(
        syntax=inner.choice("syntax", ("lark", "regex")) or "lark",
        definition=inner.required_text("definition"),
    )


def choose(
    tools: list[ToolSpec], choice: ToolChoice, *, param: str, keep_when_none: bool, thinks: bool
) -> tuple[list[ToolSpec], ToolChoice]:
    """Return the tools that the prompt shows and the choice that is left.

    Raises RequestError, with `param`, if the choice names a tool that was not declared or demands a
    call where there is none.
    """
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise RequestError(f"names the tool {name!r}, which is not among the tools", param)
    if choice.mode == "none":
        return (tools if keep_when_none else []), choice
    if not tools and choice.mode == "required":
        raise RequestError("demands a call, and there is no tool to call: send tools", param)
    if not tools:
        return tools, replace(choice, mode="auto")
    if choice.mode == "required" and len(choice.names) == 1 and not thinks:
        return [tool for tool in tools if tool.name == choice.names[0]], choice
    return tools, choice


def read_chat_choice(value: object, param: str, *, parallel: bool) -> ToolChoice:
    """Read `tool_choice` of Chat Completions or Responses."""
    if value is None or value in ("auto", "none", "required"):
        mode: Any = value or "auto"
        return ToolChoice(mode=mode, parallel=parallel)
    fields = as_mapping(value) or {}
    kind = fields.get("type")
    if kind in ("function", "custom"):
        return ToolChoice(mode="required", names=(_named(fields, kind, param),), parallel=parallel)
    if kind == "allowed_tools":
        inner = as_mapping(fields.get("allowed_tools")) or fields
        mode = inner.get("mode", "auto")
        listed: Any = inner.get("tools")
        if mode in ("auto", "required") and isinstance(listed, list):
            tools = [as_mapping(tool) or {} for tool in cast("list[object]", listed)]
            names = tuple(_named(tool, tool.get("type"), param) for tool in tools)
            return ToolChoice(mode=mode, names=names, parallel=parallel)
    raise RequestError(
        "must be auto, none, required, a named function or allowed_tools: see the OpenAI API", param
    )


def read_messages_choice(choice: Fields | None) -> ToolChoice:
    """Read `tool_choice` of Messages."""
    if choice is None:
        return ToolChoice()
    kind = choice.choice("type", ("auto", "any", "tool", "none"))
    parallel = not choice.boolean("disable_parallel_tool_use")
    if kind == "tool":
        return ToolChoice(mode="required", names=(choice.required_text("name"),), parallel=parallel)
    mode: Any = {"any": "required", "none": "none"}.get(kind or "auto", "auto")
    return ToolChoice(mode=mode, parallel=parallel)


def _named(fields: Mapping[str, Any], kind: Any, param: str) -> str:
    inner = as_mapping(fields.get(kind)) or fields if isinstance(kind, str) else fields
    name = inner.get("name")
    if not isinstance(name, str):
        raise RequestError("names no tool: a name is needed", param)
    namespace = inner.get("namespace")
    return prompt_name(name, namespace if isinstance(namespace, str) else None)

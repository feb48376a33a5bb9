"""What a strict tool's schema demands of each argument: of its raw text, and of its JSON.

A string argument is written as raw text, which a grammar can hold to a list of values, a length and
a pattern. Everything else is JSON, and so is a string with demands beyond these: both are left to
the compiler of JSON schemas, which refuses what it cannot enforce. Nothing is dropped silently.

Paper: §5.1.1 (tool-call schema).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import unquote

from fathom.chat.requests import ToolSpec
from fathom.server.problems import Problem

Form = Mapping[str, Any]

_NOT_STRINGS = ["null", "boolean", "number", "array", "object"]
# Keywords that demand nothing, or nothing that this server promises to enforce.
_ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly",
    "format", "$comment", "$schema", "$id", "$anchor", "$defs", "definitions", "contentEncoding",
    "contentMediaType", "nullable", "strict",
))  # fmt: skip
_OF_STRINGS = frozenset(("type", "enum", "const", "minLength", "maxLength", "pattern"))
_OF_OTHERS = frozenset((
    "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
    "maxItems", "uniqueItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minProperties", "maxProperties", "patternProperties", "propertyNames",
))  # fmt: skip
_OF_ROOT = frozenset(("type", "properties", "required", "additionalProperties"))
_ASSERTIONS = _OF_STRINGS | _OF_OTHERS | frozenset((
    "$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else",
    "contains", "minContains", "maxContains", "additionalItems", "unevaluatedItems",
    "unevaluatedProperties", "dependencies", "dependentRequired", "dependentSchemas",
))  # fmt: skip


def root_of(tool: ToolSpec) -> Form:
    """The schema of all arguments. Raises Problem for one that cannot be enforced as it says."""
    schema = tool.parameters
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    root = resolve(schema, shared)
    if not isinstance(root, Mapping):
        raise _refused(tool, "it must be an object")
    root = cast("dict[str, Any]", {**root, **shared})
    beyond = [key for key in root if key in _ASSERTIONS - _OF_ROOT]
    if beyond:
        raise _refused(tool, f"{', '.join(beyond)} beside its properties cannot be enforced")
    if root.get("type", "object") != "object":
        raise _refused(tool, 'its type must be "object"')
    if root.get("additionalProperties", False) is not False:
        raise _refused(tool, "additionalProperties must be false: name all arguments")
    missing = [name for name in root.get("required", []) if name not in root.get("properties", {})]
    if missing:
        raise _refused(tool, f"it requires {missing[0]!r:.80}, which is none of its properties")
    return root


def split(form: Any, shared: Form) -> tuple[Sequence[Form], dict[str, Any] | None]:
    """What is demanded of the argument as a raw string, one by one of several ways, and as JSON.

    No strings, or None, where it cannot be one.
    """
    form = resolve(form, shared)
    if isinstance(form, bool):
        form = {} if form else {"enum": []}
    form = cast("Form", form)
    demands = [key for key in form if key in _ASSERTIONS]
    for word in ("anyOf", "oneOf"):
        if demands == [word]:
            return _alternatives(word, form, shared)
    kind = form.get("type", ["string", *_NOT_STRINGS])
    kinds = cast("list[str]", [kind] if isinstance(kind, str) else kind)
    if "string" not in kinds:
        return [], dict(form)
    if not set(demands) <= _OF_STRINGS | _OF_OTHERS:
        return [], dict(form)  # also its strings are JSON
    string = {key: form[key] for key in demands if key in _OF_STRINGS}
    values = enumerated(string)
    strings = [string] if values is None or values else []
    rest = [kind for kind in kinds if kind != "string"]
    if not rest:
        return strings, None
    others = {key: value for key, value in form.items() if key not in ("pattern", "enum", "const")}
    others |= {"type": rest}
    every = [form["const"]] if "const" in form else form.get("enum")
    if every is not None:
        others["enum"] = [value for value in every if not isinstance(value, str)]
        if not others["enum"]:
            return strings, None
    return strings, others


def _alternatives(
    word: str, form: Form, shared: Form
) -> tuple[Sequence[Form], dict[str, Any] | None]:
    parts = [split(option, shared) for option in form[word]]
    strings = [string for found, _ in parts for string in found]
    others = [other for _, other in parts if other is not None]
    if word == "oneOf" and len(strings) > 1:
        return [], dict(form)  # a text might fit two of them
    return strings, {word: others} if others else None


def enumerated(form: Form) -> list[str] | None:
    """The strings that a schema lists, None if it lists nothing."""
    values = cast("list[Any] | None", form.get("enum"))
    if "const" in form:
        values = [form["const"]] if values is None or form["const"] in values else []
    return None if values is None else [value for value in values if isinstance(value, str)]


def resolve(form: Any, shared: Form) -> Any:
    """Follow references to shared definitions, alone or in an allOf of one, to what they mean."""
    for _ in range(64):
        if not isinstance(form, Mapping):
            return form
        demands = [key for key in form if key in _ASSERTIONS]
        if demands == ["allOf"] and len(form["allOf"]) == 1:
            form = form["allOf"][0]
            continue
        if demands != ["$ref"]:
            return form
        found = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", form["$ref"])
        name = unquote(found[2]).replace("~1", "/").replace("~0", "~") if found else ""
        if found is None or name not in shared.get(found[1], {}):
            return form
        form = shared[found[1]][name]
    return form


def _refused(tool: ToolSpec, message: str) -> Problem:
    return Problem(400, f"tool {tool.name!r} cannot be strict: {message}",
                   code="unsupported_schema", param="tools")  # fmt: skip

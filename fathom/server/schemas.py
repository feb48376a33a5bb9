"""Schemas of clients, which replies are held to: how large they may be, and whether they are well
formed.

Everything here goes through a schema without recursion, so that no schema can exhaust the stack.
What the compiler of grammars does with it is recursive, along references too; the bound on levels
keeps it far from the end of the stack that `run_on_deep_stack` gives it.

Paper: none (security).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from fathom.server.problems import Problem
from fathom.server.settings import Limits

T = TypeVar("T")

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
           "unevaluatedProperties", "unevaluatedItems", "additionalItems")  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_STACK_BYTES = 256 << 20  # address space, not memory: only what is used becomes real
_stack_lock = threading.Lock()


def check_schema(schema: Any, param: str, limits: Limits, *, enforced: bool) -> None:
    """Raises Problem for a schema that is too deep or too long.

    enforced: the reply will be held to it, so it must be well formed, and its references few.
    """
    size, deepest, identified = 0, 0, 0
    references: list[str] = []
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        if depth > limits.schema_depth:
            raise Problem(400, f"the schema is nested deeper than {limits.schema_depth} levels",
                          code="schema_too_deep", param=param)  # fmt: skip
        if isinstance(node, Mapping):
            mapping = cast("Mapping[str, Any]", node)
            size += 2 + sum(len(key) + 4 for key in mapping)
            references += [v for k in _REFERENCES if isinstance(v := mapping.get(k), str)]
            identified += depth > 1 and isinstance(mapping.get("$id"), str)
            stack += [(child, depth + 1) for child in mapping.values()]
        elif isinstance(node, list):
            items = cast("list[Any]", node)
            size += 2 + len(items)
            stack += [(child, depth + 1) for child in items]
        else:
            size += len(node) + 2 if isinstance(node, str) else 4
        if size > limits.schema_bytes:
            raise Problem(400, f"the schema is longer than {limits.schema_bytes} bytes",
                          code="schema_too_large", param=param)  # fmt: skip
    if not enforced:
        return
    # The same reference means the same place, unless parts of the schema have names of their own.
    links = len(references) if identified else len(set(references))
    if links * deepest > limits.schema_levels:
        raise Problem(
            400,
            f"the schema has {links} references and {deepest} levels: followed one after the other "
            f"they could lead {links * deepest} levels deep; at most {limits.schema_levels} are "
            "allowed",
            code="schema_too_deep",
            param=param,
        )
    _check_form(schema, param, limits)


def _check_form(schema: Any, param: str, limits: Limits) -> None:
    """Raises Problem for a schema whose keywords hold what they cannot, as `"required": 5`."""
    stack: list[tuple[Any, str]] = [(schema, "")]
    while stack:
        node, path = stack.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, Mapping):
            _fail(param, path, "must be an object or a truth value")
        for fault in _faults(cast("Mapping[str, Any]", node), limits):
            _fail(param, f"{path}.{fault[0]}", fault[1])
        stack += [(child, path + at) for at, child in _parts(cast("Mapping[str, Any]", node))]


def _faults(node: Mapping[str, Any], limits: Limits) -> Iterator[tuple[str, str]]:
    for name in _MAPS:
        if name in node and not isinstance(node[name], Mapping):
            yield name, "must be an object"
    for name in _LISTS:
        if name in node and not (isinstance(node[name], list) and node[name]):
            yield name, "must be a list of schemas, not empty"
    for name in (*_REFERENCES, "pattern"):
        if name in node and not isinstance(node[name], str):
            yield name, "must be text"
    for name in _COUNTS:
        value = node.get(name)
        if value is not None and (not isinstance(value, int) or not 0 <= value < 1 << 31):
            yield name, "must be a whole number from 0 to 2147483647"
    if not _texts(node.get("required", [])):
        yield "required", "must be a list of names"
    if not isinstance(node.get("enum", []), list):
        yield "enum", "must be a list"
    kind = node.get("type", "object")
    if not isinstance(kind, str) and not (_texts(kind) and kind):
        yield "type", "must be the name of a type, or a list of such names"
    pattern = node.get("pattern")
    if isinstance(pattern, str) and pattern_size(pattern) > limits.pattern_size:
        yield "pattern", (f"repeats too much: written out it is longer than {limits.pattern_size} "
                          "characters")  # fmt: skip


def _parts(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas right inside a well formed one, with where they are."""
    for name in _MAPS:
        for key, child in node.get(name, {}).items():
            yield f".{name}.{key[:60]}", child
    for name in _LISTS:
        for at, child in enumerate(node.get(name, [])):
            yield f".{name}[{at}]", child
    for name in _SINGLE:
        if name in node:
            yield f".{name}", node[name]
    items = node.get("items", True)
    for at, child in enumerate(items if isinstance(items, list) else [items]):
        yield f".items[{at}]" if isinstance(items, list) else ".items", child


def pattern_size(pattern: str) -> int:
    """About how long a regular expression is with its repetitions written out."""
    open_groups: list[int] = []  # what lies before each open bracket
    size = last = 0  # of the group at hand, and of its last part
    for found in _PATTERN.finditer(pattern):
        part = found[0]
        if part == "(":
            open_groups.append(size)
            size = last = 0
        elif part == ")":
            last = size
            size += open_groups.pop() if open_groups else 0
        elif found[1] is not None:
            times = max(int(found[1][:9] or 0), int((found[2] or "")[:9] or 0), 1)
            size += last * (times - 1)
            last *= times
        else:
            last = 1
            size += 1
    return size + sum(open_groups)


_PATTERN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def run_on_deep_stack(work: Callable[[], T]) -> T:
    """`work()` on a thread of its own with a stack for recursion far beyond what bounds allow."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # carried over to the caller
            failures.append(error)

    with _stack_lock:  # the size is one setting for the whole process
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="deep-stack")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in cast("list[Any]", value))


def _fail(param: str, path: str, message: str) -> Any:
    where = path.removeprefix(".")[:200]
    raise Problem(400, f"the schema{f': {where}' if where else ''} {message}",
                  code="invalid_schema", param=param)  # fmt: skip

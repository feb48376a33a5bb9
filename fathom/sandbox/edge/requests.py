"""What may be asked of the privileged parent, and the checks of every value of a request.

Whoever asks may be a taken-over process. So a request is an operation of the table below with the
fields that it has and no others, each of one narrow type: names of sandboxes and snapshots of the
form that the daemon itself gives, bounded texts and numbers, specifications and policies by their
own checks. No field is a path, except a work folder, which `Keeper` holds to the allowed ones.

Paper: none (input checks).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import plain
from fathom.sandbox.net import Net
from fathom.sandbox.types import SNAPSHOT, Kept

BOX = re.compile(r"sb-[0-9]{1,10}-[0-9a-f]{10}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,299}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_TEXT = 256
_LONGEST_PATH = 4096
_GREATEST_SIZE = 1 << 50
_MOST_AT_ONCE = 1024
_MOST_RULES = 256
Reader = Callable[[Any], Any]


def _refuse(value: object, what: str) -> SandboxError:
    return SandboxError(f"{str(value)[:80]!r} is no {what}")


def text(value: Any, most: int = _LONGEST_TEXT) -> str:
    """Take a short text without control characters."""
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise _refuse(value, f"plain text of at most {most} characters")
    return value


def boolean(value: Any) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise _refuse(value, "true or false")
    return value


def _whole(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _refuse(value, f"whole number from {least} to {most}")
    return value


def integer(least: int, most: int) -> Reader:
    """Return the reader of whole numbers within bounds."""
    return lambda value: _whole(value, least, most)


def number(value: Any) -> float:
    """Take a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _refuse(value, "number")
    return value


def size(value: Any) -> int | str:
    """Take a size as `Container` takes it."""
    return text(value, 32) if isinstance(value, str) else _whole(value, 1, _GREATEST_SIZE)


def _form(pattern: re.Pattern[str], what: str) -> Reader:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _refuse(value, what)
        return value

    return read


def box(value: Any) -> str:
    """Take the name of a sandbox, as this daemon gives them. Raises SandboxLost for others."""
    if not isinstance(value, str) or not BOX.fullmatch(value):
        raise SandboxLost(f"there is no sandbox {str(value)[:80]!r}")
    return value


def image(value: Any) -> str:
    """Take the name or digest of an image."""
    found = _form(_IMAGE, "name of an image")(value)
    if ".." in found:
        raise _refuse(value, "name of an image")
    return found


def _listed(reader: Reader, most: int) -> Reader:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _refuse(value, "list")
        items = cast("list[Any]", value)
        if len(items) > most:
            raise SandboxError(f"a list has {len(items)} parts, more than {most}")
        return [reader(item) for item in items]

    return read


_SPEC: dict[str, Reader] = {
    "type": text,
    "workdir": lambda value: text(value, _LONGEST_PATH),
    "door": lambda value: text(value, _LONGEST_PATH),
    "memory": size,
    "disk": size,
    "io_read": size,
    "io_write": size,
    "pids": integer(1, 1 << 20),
    "cpu": number,
    "image": image,
    "hostname": text,
    "user": text,
    "ttl": number,
    "idle_ttl": number,
}


def spec(value: Any) -> Kept:
    """Take what a sandbox is made from; its own `check` comes once the folder is judged."""
    return plain.spec_in(_fields(value, _SPEC, "a sandbox"))


def _domain(value: Any) -> list[Any]:
    name, ports, private = value
    return [text(name), _listed(integer(1, 65535), 64)(ports), boolean(private)]


def _address(value: Any) -> list[Any]:
    host, port = value
    return [text(host), _whole(port, 1, 65535)]


_NET: dict[str, Reader] = {
    "addresses": _listed(_address, _MOST_RULES),
    "domains": _listed(_domain, _MOST_RULES),
    "mirrors": _listed(text, _MOST_RULES),
}


def net(value: Any) -> Net:
    """Take a network policy."""
    found = plain.net_in(_fields(value, _NET, "a policy"))
    assert found is not None
    return found


def _fields(value: Any, table: Mapping[str, Reader], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(value, "JSON object")
    given = cast("dict[Any, Any]", value)
    for name in given:
        if name not in table:
            raise SandboxError(f"{what} has no {str(name)[:80]!r}")
    # What is null was not given.
    return {name: table[name](item) for name, item in given.items() if item is not None}


_boxes = _listed(box, 1 << 16)
_ONE = {"id": box}
# Operation -> its fields. Those in _NEEDED must be there and are not null.
OPERATIONS: dict[str, dict[str, Reader]] = {
    "create": {"spec": spec, "key": text, "group": text, "net": net},
    "restore": {"snapshot": _form(SNAPSHOT, "name of a snapshot"), "spec": spec, "group": text},
    "fork": {"id": box, "count": integer(1, _MOST_AT_ONCE), "reseed": boolean},
    "prewarm": {"spec": spec, "count": integer(0, _MOST_AT_ONCE)},
    "destroy": _ONE,
    "freeze": {"ids": _boxes, "group": text, "reclaim": boolean},
    "thaw": {"ids": _boxes, "group": text},
    "phase": {"id": box, "phase": text, "net": net},
    "pack": {"id": box, "name": image},
    "list": {},
    "metrics": {},
    **dict.fromkeys(("attach", "stats", "snapshot", "netlog", "screenshot", "oom"), _ONE),
}
# What the API process asks on its own behalf.
INTERNAL: dict[str, dict[str, Reader]] = {
    "ready": {},
    "open": _ONE,
    "idle": _ONE,
    "token": {"digest": _form(_DIGEST, "digest")},
}
_NEEDED = frozenset({"spec", "id", "count", "snapshot", "digest", "phase"})


def read(op: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked fields of a request. Raises SandboxError, Unsupported."""
    table = {**OPERATIONS, **INTERNAL}
    if not isinstance(op, str) or op not in table:
        raise Unsupported(f"this daemon has no operation {str(op)[:80]!r}")
    try:
        found = _fields(dict(given), table[op], op)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SandboxError(f"the request does not fit {op}: {str(error)[:200]}") from error
    for name in table[op]:
        if name in _NEEDED and name not in found:
            raise SandboxError(f"the request {op} needs {name}")
    return found

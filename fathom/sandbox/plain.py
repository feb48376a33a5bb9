"""Values of the surface as plain JSON and back, for a daemon's socket and its files.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox.net import Net
from fathom.sandbox.types import Caps, Container, FullVM, Kept, MicroVM

_TYPES: dict[str, type[Kept]] = {"container": Container, "microvm": MicroVM, "fullvm": FullVM}
_SETS = ("enforced", "not_enforced", "networks")


def spec_out(spec: Kept) -> dict[str, Any]:
    """Turn a sandbox's values into JSON, with the name of its type; its folders become text."""
    values = asdict(spec)
    for name in ("workdir", "door"):
        if values.get(name) is not None:
            values[name] = str(Path(values[name]).absolute())
    kind = next(name for name, one in _TYPES.items() if type(spec) is one)
    return {"type": kind, **values}


def spec_in(values: dict[str, Any]) -> Kept:
    """Read a sandbox's values, of a container where they name no type.

    Raises SandboxError for names that the type has not.
    """
    given = dict(values)
    kind = given.pop("type", "container")
    if kind not in _TYPES:
        raise SandboxError(f"there is no type of sandbox called {str(kind)[:80]!r}")
    known = {field.name for field in fields(_TYPES[kind])}
    if unknown := sorted(set(given) - known):
        raise SandboxError(f"a {kind} has no {', '.join(unknown)}")
    return _TYPES[kind](**given)


def caps_out(caps: Caps) -> dict[str, Any]:
    """Turn caps into JSON."""
    values = asdict(caps)
    return {name: sorted(v) if name in _SETS else v for name, v in values.items()}


def caps_in(values: dict[str, Any]) -> Caps:
    """Read caps; what a newer daemon says beyond them is left out."""
    known = {field.name for field in fields(Caps)}
    kept: dict[str, Any] = {
        name: frozenset(value) if name in _SETS else value
        for name, value in values.items()
        if name in known
    }
    return Caps(**kept)


def net_out(net: Net | None) -> dict[str, Any] | None:
    """Turn a policy into JSON."""
    return None if net is None else asdict(net)


def net_in(values: dict[str, Any] | None) -> Net | None:
    """Read a policy, checking every part of it again. Raises SandboxError."""
    if values is None:
        return None
    net = Net.deny()
    for host, port in values.get("addresses", ()):
        net = net.address(host, port)
    for name, ports, private in values.get("domains", ()):
        net = net.domain(name, *ports, private=private)
    for name in values.get("mirrors", ()):
        net = net.mirror(name)
    return net

"""Values of the surface as plain JSON and back, for a daemon's socket and its files.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox.net import Net
from fathom.sandbox.types import Caps, Container

_SETS = ("enforced", "not_enforced", "networks")


def container_out(spec: Container) -> dict[str, Any]:
    """Turn a container's values into JSON; its folder becomes text."""
    values = asdict(spec)
    values["workdir"] = None if spec.workdir is None else str(spec.workdir)
    return values


def container_in(values: dict[str, Any]) -> Container:
    """Read a container's values. Raises SandboxError for names that it has not."""
    known = {field.name for field in fields(Container)}
    if unknown := sorted(set(values) - known):
        raise SandboxError(f"a container has no {', '.join(unknown)}")
    return Container(**values)


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
    for name, ports in values.get("domains", ()):
        net = net.domain(name, *ports, private=bool(values.get("private")))
    for name in values.get("mirrors", ()):
        net = net.mirror(name)
    return net

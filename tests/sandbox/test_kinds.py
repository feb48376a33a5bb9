"""Values of another type than asked for: a sentence that names them, never Python's own words."""

from __future__ import annotations

from typing import Any

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Container, FullVM, MicroVM, SyncClient

ODD: list[Any] = ["5", b"x", [], {}, True, object(), float("nan"), float("inf"), 10**400, -1]
VALUES = [(name, value) for name in ("cpu", "ttl", "idle_ttl") for value in ODD if value != 10**400]
VALUES += [("ttl", 10**400), ("pids", 1.5), ("pids", "5"), ("pids", True), ("pids", [])]
VALUES += [(name, value) for name in ("memory", "disk") for value in (1.5, True, [], b"1GiB", "x")]
VALUES += [(name, value) for name in ("image", "hostname") for value in (5, b"x", [], "", "a\0b/")]
FOLDERS: list[tuple[str, Any]] = [
    ("workdir", 5),
    ("workdir", [1]),
    ("door", b"/tmp"),
    ("door", "\0"),
]


@pytest.mark.parametrize(("name", "value"), [*VALUES, *FOLDERS])
def test_odd_values_are_told_by_name(name: str, value: Any):
    for kind in (Container, MicroVM, FullVM):
        if name not in kind.__dataclass_fields__ or (name, value) == ("image", "a\0b/"):
            continue
        with pytest.raises(SandboxError) as caught:
            kind(**{name: value}).check()
        said = str(caught.value)
        assert name in said
        assert len(said) < 400
        assert "must be real number" not in said
        assert "object" not in said.replace("<object object", "")


def test_odd_arguments_are_told_by_name(client: SyncClient):
    odd: Any
    for odd in (5, "base", Container):
        with pytest.raises(SandboxError, match="no sandbox"):
            client.create(odd)
        with pytest.raises(SandboxError, match="no sandbox"):
            client.prewarm(odd, 1)
    for name in ("key", "group", "net"):
        with pytest.raises(SandboxError, match=name):
            client.create(Container(), **{name: 5})  # type: ignore[arg-type]
    sandbox = client.create(Container())
    for odd in ("2", 1.5, True, None, 0):
        with pytest.raises(SandboxError, match=r"count|no fork"):
            sandbox.fork(odd)

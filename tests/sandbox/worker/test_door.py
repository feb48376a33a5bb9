"""The door of a worker: what a stranger asks for costs the host neither memory nor the door."""

from __future__ import annotations

import json
import struct
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fathom.errors import FathomError
from fathom.sandbox.trajectory.frames import Line
from fathom.sandbox.trajectory.operation import Operation, Outcome
from fathom.sandbox.worker.door import LARGEST, LARGEST_HEAD, Door

HEAD = {
    "ask": "run",
    "key": "k",
    "verb": "exec",
    "effect": "once",
    "has_data": False,
    "arguments": {"command": "true", "timeout": 5, "cap": 10},
}


class Session:
    """Runs nothing; `held` keeps what it began from ending."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.ran: list[str] = []
        self.held = anyio.Event()

    async def run(self, operation: Operation) -> Outcome:
        self.ran.append(str(operation.request.arguments["command"]))
        if self.problem is not None:
            raise self.problem
        await self.held.wait()
        return Outcome(blobs={"stdout": operation.key.encode()})


async def lives() -> bool:
    return True


async def ask(door: Door, session: Session, *heads: dict[str, Any]) -> list[str]:
    """Ask for these at the same time, and say what came of each."""
    said: list[str] = [""] * len(heads)

    async def one(number: int, head: dict[str, Any]) -> None:
        try:
            said[number] = (await door._answer((head, b"")))[0]["is"]  # pyright: ignore
        except FathomError as error:
            said[number] = str(error)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            door._group = group  # pyright: ignore
            for number, head in enumerate(heads):
                group.start_soon(one, number, head)
            while len(session.ran) < len({json.dumps(head) for head in heads}):
                await anyio.lowlevel.checkpoint()
            session.held.set()
    return said


def test_what_came_of_an_operation_is_not_held():
    async def main() -> None:
        session = Session()
        door = Door(session, {}, ("h", 1), lives)  # type: ignore[arg-type]
        assert await ask(door, session, HEAD, HEAD) == ["ended", "ended"]
        assert session.ran == ["true"]
        assert door._jobs == {}  # pyright: ignore
        assert await ask(door, session, HEAD) == ["ended"]

    anyio.run(main)


def test_two_requests_under_one_key_both_come_to_an_end():
    other = {**HEAD, "arguments": {**HEAD["arguments"], "command": "false"}}  # type: ignore[dict-item]

    async def main() -> None:
        session = Session()
        door = Door(session, {}, ("h", 1), lives)  # type: ignore[arg-type]
        assert await ask(door, session, HEAD, other) == ["ended", "ended"]
        assert door._jobs == {}  # pyright: ignore

    anyio.run(main)


@pytest.mark.parametrize("problem", [ValueError("no sense"), RuntimeError("a defect")])
def test_a_defect_about_one_operation_leaves_the_door_open(problem: Exception):
    async def main() -> None:
        session = Session(problem)
        door = Door(session, {}, ("h", 1), lives)  # type: ignore[arg-type]
        assert await ask(door, session, HEAD) == [f"k could not be done: {problem}"]

    anyio.run(main)


class Stream:
    """Gives these bytes, then the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.taken = 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self.taken >= len(self.data):
            raise anyio.EndOfStream
        piece = self.data[self.taken : self.taken + max_bytes]
        self.taken += len(piece)
        return piece


def test_a_head_of_json_is_smaller_than_what_may_follow_it():
    async def receive(head: int, data: int) -> tuple[object, int]:
        content = b"1".ljust(head) + bytes(data)
        stream = Stream(struct.pack("<II", head, data) + content)
        return await Line(stream, LARGEST, LARGEST_HEAD).receive(), stream.taken  # type: ignore[arg-type]

    found, _ = anyio.run(receive, 10, 100)
    assert found == (1, bytes(100))
    found, taken = anyio.run(receive, LARGEST_HEAD + 1, 0)
    assert found is None
    assert taken <= 1 << 17

"""A daemon that is busy, or short of something: nothing is forgotten, nobody waits for nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fathom.errors import DaemonLost, PolicyDenied, SandboxLost
from fathom.sandbox import plain
from fathom.sandbox.edge import front
from fathom.sandbox.edge.age import Birth
from fathom.sandbox.edge.channel import Channel
from fathom.sandbox.edge.entry import Entry
from fathom.sandbox.edge.front import Front, Live
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.work import Work
from fathom.sandbox.host import LocalHost
from fathom.sandbox.types import Caps, Container

NAME = "sb-1-0123456789"


@pytest.mark.parametrize(
    ("answer", "stays"),
    [
        ({"error": PolicyDenied.code, "message": "ask again later"}, True),
        ({"error": DaemonLost.code, "message": "left alone"}, True),
        ({"ended": False}, True),
        ({"error": SandboxLost.code, "message": "it ended"}, False),
        ({"ended": True}, False),
    ],
)
def test_an_idle_sandbox_is_forgotten_only_once_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], stays: bool
):
    monkeypatch.setattr(front, "_TICK", 0.0)
    served = Front()

    async def ask(*_: object) -> dict[str, Any]:
        return dict(answer)

    async def main() -> None:
        served.upcall = SimpleNamespace(ask=ask)  # type: ignore[assignment]
        served.live[NAME] = Live(-1.0, time.monotonic())
        minding = asyncio.create_task(served.mind())
        for _ in range(20):
            await asyncio.sleep(0)
        minding.cancel()

    asyncio.run(main())
    assert (NAME in served.live) == stays


def test_a_defect_while_requests_are_read_ends_the_api_process():
    def broken(_: str) -> bool:
        raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(10)
        keeper: Any = SimpleNamespace(is_paused=broken)
        thread = threading.Thread(target=Channel(ours, keeper, None, None).serve)  # type: ignore[arg-type]
        thread.start()
        theirs.send(json.dumps({"n": 1, "op": "open", "id": NAME}).encode())
        assert theirs.recv(1000) == b""
        thread.join()


def test_work_waits_for_a_thread_where_no_other_can_be_started(monkeypatch: pytest.MonkeyPatch):
    work = Work(2)
    done, hold = threading.Event(), threading.Event()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work.add("stats", hold.wait, size=1)  # type: ignore[arg-type]
    work.add("stats", done.set, size=1)
    hold.set()
    assert done.wait(10)
    work.shutdown()


def test_a_key_of_one_that_was_left_alone_makes_no_second_one(tmp_path: Path):
    (tmp_path / NAME).mkdir()
    caps = plain.caps_in(dict.fromkeys(Caps.__dataclass_fields__, ()))
    spec = Container()
    Entry(NAME, spec, caps, "", "key", "", Birth.now()).write(tmp_path)
    keeper = Keeper(LocalHost("auto", tmp_path / "cache", tmp_path), spare=0)
    keeper.tending.left[NAME] = "it does not answer"
    with pytest.raises(DaemonLost, match="it does not answer"):
        keeper.do("create", {"spec": spec, "key": "key"})

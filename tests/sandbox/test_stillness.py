"""Sandboxes that stand still: for their user, for copies, for both, with a crowd at the door."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import SandboxLost
from fathom.sandbox import (
    Container,
    ExecResult,
    SyncClient,
    SyncSandbox,
    box,
    cgroups,
    messages,
    state,
)
from fathom.sandbox.cgroups import Group

# More than wait at an agent's door, and more than there are processes for.
COMMANDS, PIDS = 300, 128


@pytest.fixture
def still(client: SyncClient) -> SyncSandbox:
    made = client.create(Container(pids=PIDS))
    if not made.caps.pause:
        pytest.skip("this substrate has no pause")
    return made


def frozen(sandbox: SyncSandbox) -> bool:
    layout = cgroups.current_layout()
    assert layout is not None
    return Group(layout, sandbox.id).frozen


def ask_node(client: SyncClient, op: str, **values: Any) -> dict[str, Any]:
    return client._client._host.link.request(op, **values)  # pyright: ignore


def test_a_pause_outlives_the_copies(client: SyncClient, still: SyncSandbox):
    ask_node(client, "freeze", ids=[still.id], holder="one copy")
    ask_node(client, "freeze", ids=[still.id], holder="another")
    still.pause()
    still.pause()
    ask_node(client, "thaw", ids=[still.id], holder="one copy")
    ask_node(client, "thaw", ids=[still.id], holder="one copy")
    assert frozen(still)
    ask_node(client, "thaw", ids=[still.id], holder="another")
    assert frozen(still)
    still.resume()
    assert not frozen(still)
    assert still.exec("echo on", timeout=10).stdout == "on\n"


def test_a_copy_is_of_one_moment_whoever_asks_meanwhile(client: SyncClient, still: SyncSandbox):
    still.pause()
    ask_node(client, "freeze", ids=[still.id], holder="a copy")
    said: list[str] = []
    worker = threading.Thread(
        target=lambda: said.append(still.exec("echo on", timeout=10).stdout), daemon=True
    )
    worker.start()
    time.sleep(0.5)
    assert frozen(still)
    assert said == []
    ask_node(client, "thaw", ids=[still.id], holder="a copy")
    worker.join(20)
    assert said == ["on\n"]


def test_pausing_while_it_is_copied(still: SyncSandbox):
    still.exec("head -c 30000000 /dev/zero > big", timeout=30)
    copies: list[SyncSandbox] = []
    worker = threading.Thread(target=lambda: copies.extend(still.fork(3)))
    worker.start()
    deadline = time.monotonic() + 20
    while not frozen(still) and worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    still.pause()
    worker.join()
    assert len(copies) == 3
    assert frozen(still)
    still.resume()
    assert not frozen(still)


def test_a_pause_of_several_that_fails_pauses_none(client: SyncClient, still: SyncSandbox):
    with pytest.raises(Exception, match="ended"):
        ask_node(client, "freeze", ids=[still.id, "sb-1-0000000000"])
    assert not frozen(still)


@pytest.mark.parametrize("how", ["pause", "fork"])
def test_a_crowd_at_the_door_of_one_that_stands_still(
    client: SyncClient, still: SyncSandbox, options: dict[str, Path], how: str
):
    """It goes on, and each of those that waited is served."""
    holder = {"holder": "a copy"} if how == "fork" else {}
    ended: list[ExecResult] = []
    slow = threading.Thread(target=lambda: ended.append(still.exec("sleep 1", timeout=2.5)))
    slow.start()
    time.sleep(0.5)
    ask_node(client, "freeze", ids=[still.id], **holder)
    said: dict[int, str] = {}

    def ask(number: int) -> None:
        try:
            said[number] = still.exec(f"echo {number}", timeout=60).stdout
        except Exception as error:
            said[number] = repr(error)

    workers = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(COMMANDS)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 30
    while not full(options["runtime_dir"] / still.id):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
    answer: list[Any] = []
    resume = threading.Thread(
        target=lambda: answer.append(ask_node(client, "thaw", ids=[still.id], **holder)),
        daemon=True,
    )
    resume.start()
    resume.join(20)
    assert answer, "it stands still for ever"
    assert answer[0]["paused"][still.id] > 2
    for worker in workers:
        worker.join(60)
    assert {n: text for n, text in said.items() if text != f"{n}\n"} == {}
    assert len(said) == COMMANDS
    slow.join()
    assert [result.timed_out for result in ended] == [False], "the pause counted"


def test_whoever_comes_as_a_crowd_leaves_is_let_in(
    client: SyncClient, still: SyncSandbox, options: dict[str, Path]
):
    """Lines that have ended are no strangers at the door."""
    folder = options["runtime_dir"] / still.id
    secret = json.loads((folder / state.SESSION).read_text())["secret"]
    crowd: list[socket.socket] = []
    for _ in range(60):
        crowd.append(messages.connect(folder, state.SOCKET))
        crowd[-1].sendall(box.greeting(bytes.fromhex(secret)))
        assert crowd[-1].recv(1000)
    ask_node(client, "freeze", ids=[still.id], holder="a copy")
    for line in crowd:
        line.close()
    said: list[str] = []
    worker = threading.Thread(
        target=lambda: said.append(still.exec("echo on", timeout=10).stdout), daemon=True
    )
    worker.start()
    time.sleep(0.5)
    ask_node(client, "thaw", ids=[still.id], holder="a copy")
    worker.join(20)
    assert said == ["on\n"]


def test_standing_still_for_longer_than_a_caller_is_patient(
    client: SyncClient, still: SyncSandbox, monkeypatch: pytest.MonkeyPatch
):
    """For a copy, say: it is not taken for lost, by none of those who wait."""
    monkeypatch.setattr("fathom.sandbox.sandbox._PATIENCE", 0.5)
    said: list[str] = []
    workers = [
        threading.Thread(
            target=lambda: said.append(still.exec("echo on", timeout=1).stdout), daemon=True
        )
        for _ in range(3)
    ]
    ask_node(client, "freeze", ids=[still.id], holder="a copy")
    for worker in workers:
        worker.start()
    time.sleep(2.5)
    ask_node(client, "thaw", ids=[still.id], holder="a copy")
    for worker in workers:
        worker.join(20)
    assert said == ["on\n"] * 3


def test_one_that_never_answers_is_lost_though_it_stood_still_before(
    client: SyncClient,
    still: SyncSandbox,
    options: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fathom.sandbox.sandbox._PATIENCE", 0.5)
    still.pause()
    time.sleep(0.2)
    still.resume()
    agent = state.first_process(options["runtime_dir"] / still.id)
    assert agent is not None
    os.kill(agent, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(SandboxLost, match="did not answer in time"):
        still.exec("echo on", timeout=1)
    assert time.monotonic() - began < 15


def full(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(folder / state.SOCKET))
        except BlockingIOError:
            return True
    return False

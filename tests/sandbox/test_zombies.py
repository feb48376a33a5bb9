"""Processes that nobody waited for: a node that keeps them could start nothing one day."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fathom.sandbox import Container, SyncClient, userns
from fathom.sandbox.userns import make
from tests.sandbox.conftest import zombies

MAP = "0 1610612736 65536"


def test_no_sandbox_leaves_a_zombie(client: SyncClient, tmp_path: Path):
    tmp_path.chmod(0o755)
    for _ in range(3):
        made = [client.create(), client.create(Container(workdir=tmp_path))]
        if made[0].caps.fork:
            made += made[0].fork(2)
        for sandbox in made:
            sandbox.exec("true", timeout=10)
            sandbox.stop()
    client.create()
    deadline = time.monotonic() + 5
    while found := zombies():
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.mark.usefixtures("need_root")
def test_user_namespaces_made_at_the_same_time():
    """The child of one call must not keep that of another one waiting for ever."""
    made: list[int] = []

    def work() -> None:
        for _ in range(3):
            os.close(make(MAP, MAP))
            made.append(1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(made) == 16 * 3


@pytest.mark.usefixtures("need_root")
def test_a_user_namespace_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Invalid"):
        userns.make("nonsense", MAP)
    monkeypatch.setattr(userns.syscalls, "unshare", lambda _: os._exit(0))  # pyright: ignore
    with pytest.raises(Exception, match="max_user_namespaces"):
        userns.make(MAP, MAP)
    assert len(os.listdir("/proc/self/fd")) == before

"""Machines of the daemon: they outlive it, are adopted with what runs in them, paused ones too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import FullVM, Net, state
from fathom.sandbox.vm import note
from tests.sandbox.edge.conftest import daemon  # noqa: F401
from tests.sandbox.edge.daemon import Daemon
from tests.sandbox.test_lifetime import locker_of
from tests.sandbox.vm.conftest import SPEC

TIMEOUT = 30.0
pytestmark = pytest.mark.usefixtures("need_machines")


def runs(process: int | None) -> bool:
    """Whether a process lives; one that ended may wait for a parent that is slow to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_machine_outlives_the_daemon(daemon: Daemon):  # noqa: F811
    with daemon.client() as client:
        sandbox = client.create(SPEC, key="vm/1", group="vms", net=Net.deny().domain("x.example"))
        sandbox.exec("echo kept > f; (sleep 4326 > /dev/null 2>&1 &)", timeout=TIMEOUT)
        assert sandbox.exec("echo once >> g", timeout=TIMEOUT, op="o/1").exit_code == 0
        name = sandbox.id
        copied = sandbox.fork()[0]
        copied.pause()
    process = state.first_process(daemon.folder / name)
    daemon.end(signal.SIGKILL)
    assert runs(process)
    daemon.start()
    with daemon.client() as client:
        entries = {entry["id"]: entry for entry in client.list()}
        assert entries[name]["spec"]["type"] == "microvm"
        assert entries[copied.id]["paused"]
        assert (
            client.create(SPEC, key="vm/1", group="vms", net=Net.deny().domain("x.example")).id
            == name
        )
        sandbox = client.attach(name)
        look = "cat f; pgrep -fc 'sleep 432[6]'; ls /sys/class/net | wc -l"
        assert sandbox.exec(look, timeout=TIMEOUT).stdout == "kept\n1\n2\n"
        again = sandbox.exec("echo once >> g", timeout=TIMEOUT, op="o/1")
        assert (again.replayed, sandbox.files.read("g")) == (True, b"once\n")
        # One that was adopted is copied like any other.
        (copy,) = sandbox.fork()
        assert copy.exec("cat f", timeout=TIMEOUT).stdout == "kept\n"
        # The copy that was paused goes on; it has files, and no network as no policy names it.
        other = client.attach(copied.id)
        assert other.exec("cat f; cat /sys/class/net/eth0/operstate", timeout=TIMEOUT).stdout == (
            "kept\ndown\n"
        )
        sandbox.stop()
    assert not runs(process)


def test_a_machine_outlives_the_daemon_s_node(daemon: Daemon):  # noqa: F811
    """The port's lines are the node's; the next one carries them on."""
    with daemon.client() as client:
        sandbox = client.create(SPEC)
        sandbox.exec("echo kept > f", timeout=TIMEOUT)
        os.kill(locker_of(daemon.folder / sandbox.id), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert sandbox.exec("cat f", timeout=TIMEOUT).stdout == "kept\n"
                break
            except SandboxError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        (copy,) = sandbox.fork()
        assert copy.exec("cat f", timeout=TIMEOUT).stdout == "kept\n"


@pytest.mark.full_vm
@pytest.mark.timeout(600)
def test_a_full_machine_outlives_the_daemon_and_its_node(daemon: Daemon):  # noqa: F811
    """Its emulator has copies of its disks, under numbers of its own."""
    with daemon.client() as client:
        sandbox = client.create(FullVM())
        sandbox.exec("echo kept > f; sync", timeout=TIMEOUT)
        name = sandbox.id
        os.kill(locker_of(daemon.folder / name), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            try:
                assert sandbox.exec("cat f", timeout=TIMEOUT).stdout == "kept\n"
                break
            except SandboxError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    daemon.end(signal.SIGKILL)
    daemon.start()
    with daemon.client() as client:
        (copy,) = client.attach(name).fork()
        assert copy.exec("cat f", timeout=TIMEOUT).stdout == "kept\n"


def test_a_file_is_found_by_what_it_is_and_not_by_its_number():
    kept, other = os.memfd_create("kept"), os.memfd_create("other")
    wanted = note.identity(kept)
    # Whoever holds it has another file under the number that it was given.
    code = "import os, sys; kept, other = map(int, sys.argv[1:]); os.dup2(kept, 100); "
    code += "os.dup2(other, kept); print(flush=True); input()"
    words = [sys.executable, "-c", code, str(kept), str(other)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(kept, other)
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = note.open_kept(holder.pid, wanted)
        assert note.identity(found) == wanted
        with pytest.raises(SandboxError, match="closed a file"):
            note.open_kept(holder.pid, [wanted[0], 1 << 60])
        holder.kill()
    for fd in (kept, other, found):
        os.close(fd)


def test_a_machine_that_died_while_nobody_looked(daemon: Daemon):  # noqa: F811
    with daemon.client() as client:
        name = client.create(SPEC).id
    daemon.end(signal.SIGKILL)
    process = state.first_process(daemon.folder / name)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    daemon.start()
    with daemon.client() as client:
        assert client.list() == []
    assert not (daemon.folder / name).exists()

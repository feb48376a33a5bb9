"""Full VMs: the conformance suite on a Debian system, its screen, its disk, apt through a policy.

They boot a whole system under emulation where there is nothing faster: `pytest -m full_vm`.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import Client, FullVM, Net, SyncClient, SyncSandbox, conformance

pytestmark = [
    pytest.mark.full_vm,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("need_machines"),
]
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def full(machines: SyncClient) -> SyncSandbox:
    return machines.create(FullVM())


def test_conformance(options: dict[str, Path]):
    async def run() -> conformance.Report:
        async with Client(**options) as client:
            return await conformance.run(lambda: client.create(FullVM()))

    report = anyio.run(run)
    assert report.passed, str(report)
    assert {outcome.name for outcome in report.outcomes} == set(conformance.CHECKS)


def test_it_is_a_system(full: SyncSandbox):
    shown = full.exec(
        "ps -p 1 -o comm=; systemctl is-system-running; . /etc/os-release; echo $ID",
        timeout=TIMEOUT,
    )
    assert shown.stdout.split() == ["systemd", "running", "debian"]


def test_its_screen_is_a_picture(full: SyncSandbox):
    picture = full.screenshot()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (720, 400)
    (copy,) = full.fork()
    # The screen's memory is part of a copy, although its processors never drew it.
    with copy:
        assert len(set(copy.screenshot())) > 100
        assert abs(len(copy.screenshot()) - len(picture)) < 200


def test_its_disk_is_part_of_a_snapshot(machines: SyncClient, full: SyncSandbox):
    full.exec("head -c 20M /dev/urandom > big; sha256sum big > sum; sync", timeout=TIMEOUT)
    kept = full.snapshot()
    full.exec("rm big", timeout=TIMEOUT)
    with machines.restore(kept, FullVM()) as again:
        # From the disk, not from what the memory still holds of it.
        assert again.exec("sha256sum -c sum", timeout=TIMEOUT).stdout == "big: OK\n"
        again.exec("echo more >> big", timeout=TIMEOUT)
    with machines.restore(kept, FullVM()) as third:
        assert third.exec("sha256sum -c sum", timeout=TIMEOUT).stdout == "big: OK\n"
    with pytest.raises(Unsupported, match="snapshot"):
        full.pack_diff()
    with pytest.raises(SandboxError, match="of other values"):
        machines.restore(kept, FullVM(memory="640MiB"))


def test_a_port_leads_to_a_server_in_it(full: SyncSandbox):
    server = """
use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1:8000", Listen => 5, ReuseAddr => 1);
while (my $c = $s->accept) { <$c>; print $c "from inside\n"; close $c }
"""
    full.files.write("server.pl", server)
    full.exec("perl server.pl > /dev/null 2>&1 &", timeout=TIMEOUT)
    full.exec("until : < /dev/tcp/127.0.0.1/8000; do sleep 0.2; done", timeout=TIMEOUT)
    with full.forward(8000, timeout=TIMEOUT) as address, socket.create_connection(address) as line:
        line.settimeout(20)
        line.sendall(b"hello\n")
        assert line.recv(100) == b"from inside\n"


def test_memory_is_bounded(full: SyncSandbox):
    bomb = full.exec("head -c 1G /dev/zero | tail -c 1G", timeout=TIMEOUT)
    assert bomb.oom_killed
    assert full.exec("echo alive", timeout=TIMEOUT).stdout == "alive\n"


def test_packages_are_installed_as_the_policy_allows(options: dict[str, Path]):
    """As root of the guest, whose rules are outside of it."""
    net = Net.deny().domain("deb.debian.org", private=True)
    with SyncClient(**options) as client:
        system = client.create(FullVM(user="root"), net=net)
        listed = "deb http://deb.debian.org/debian bookworm main"
        system.exec(f"echo '{listed}' > /etc/apt/sources.list", timeout=TIMEOUT)
        # Lists of translations are as long as those of packages.
        options = "-o Acquire::Languages=none"
        updated = system.exec(f"apt-get {options} update", timeout=240)
        if updated.exit_code or "Err:" in updated.output:
            pytest.skip(f"no Debian mirror is reached from here: {updated.output[-300:]}")
        install = "DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends hello"
        system.exec(install, timeout=240).check()
        assert system.exec("hello", timeout=TIMEOUT).stdout == "Hello, world!\n"
        ask = "GET http://example.org/ HTTP/1.0\\r\\nHost: example.org\\r\\n\\r\\n"
        refused = system.exec(
            f"exec 3<>/dev/tcp/10.0.2.2/3128; printf '{ask}' >&3; head -1 <&3", timeout=TIMEOUT
        )
        assert "403" in refused.stdout
        assert {entry["allowed"] for entry in system.network_log()} == {True, False}
        # Around the proxy nothing is reached, by whatever root of the guest does.
        for target in ("1.1.1.1/80", "10.0.2.3/53", "169.254.169.254/80"):
            around = f"timeout 5 bash -c ': < /dev/tcp/{target}' && echo reached"
            assert "reached" not in system.exec(around, timeout=TIMEOUT).stdout
        system.phase("closed")
        system.exec("ip link set eth0 up; ip route add default via 10.0.2.2", timeout=TIMEOUT)
        closed = system.exec("timeout 20 apt-get update 2>&1; true", timeout=TIMEOUT)
        assert "Get:" not in closed.stdout


def test_root_of_a_guest_that_takes_the_agent_s_place(machines: SyncClient):
    """It is root there, so it can speak on the port; all it gains is to lose its machine."""
    flood = (
        "head -c 3M /dev/urandom > /dev/ttyS0; for i in 1 2 3; do cat /dev/urandom > $port; done"
    )
    attack = (
        "port=$(ls /dev/vport*p1); setsid bash -c \"sleep 1; pkill -KILL -f 'agent --port'; "
        f'{flood}" > /dev/null 2>&1 &'
    )
    with machines.create(FullVM(user="root")) as hostile, machines.create(FullVM()) as other:
        hostile.exec(f"export port; {attack}", timeout=TIMEOUT)

        def wait() -> None:
            for _ in range(60):
                hostile.exec("sleep 0.5", timeout=5)

        with pytest.raises(SandboxLost):
            wait()
        assert other.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def answers(system: SyncSandbox) -> bool:
    try:
        system.ping(timeout=4)
    except SandboxLost:
        return False
    return True


def test_a_guest_that_stops_its_agent_is_paused_all_the_same(machines: SyncClient):
    stop = "setsid sh -c \"sleep 1; pkill -STOP -f 'agent --port'\" > /dev/null 2>&1 &"
    with (
        machines.create(FullVM(user="root"), group="mixed") as hostile,
        machines.create(FullVM(), group="mixed") as other,
    ):
        hostile.exec(stop, timeout=TIMEOUT)
        while answers(hostile):
            time.sleep(1)
        group = machines.group("mixed")
        for _ in range(2):
            began = time.monotonic()
            group.pause()
            assert time.monotonic() - began < 8
            with pytest.raises(SandboxError, match="did not answer"):
                hostile.fork()
            group.resume()
        assert other.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"

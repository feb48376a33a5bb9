"""Receipts of operations: what they hold is said, what they cannot is refused, nothing grows."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fathom.errors import MachineFull, SandboxError
from fathom.sandbox import Container, SyncClient, SyncSandbox, agent, box, frames
from fathom.sandbox.frames import Frame, Received, Tag
from fathom.sandbox.line import Refused
from fathom.sandbox.substrates.choice import suited
from fathom.sandbox.substrates.container import copy_tree

MIB = 1 << 20
each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)


def journal_size(folder: Path) -> int:
    return (folder / "journal").stat().st_blocks * 512


@each_substrate
def test_a_replay_under_another_cap_says_what_is_missing(sandbox: SyncSandbox):
    command = "head -c 5000 /dev/zero; head -c 7 /dev/zero >&2"
    first = sandbox.exec(command, timeout=10, op="a", cap=10)
    assert (len(first.stdout), first.truncated, first.lost) == (10, True, 0)
    again = sandbox.exec(command, timeout=10, op="a", cap=MIB)
    assert (len(again.stdout), len(again.stderr)) == (10, 7)
    assert (again.truncated, again.replayed, again.lost) == (True, True, 0)
    less = sandbox.exec(command, timeout=10, op="a", cap=3)
    assert (len(less.stdout), less.truncated) == (3, True)
    sandbox.exec("echo whole", timeout=10, op="b", cap=100)
    assert not sandbox.exec("echo whole", timeout=10, op="b", cap=MIB).truncated


@each_substrate
def test_an_acknowledged_result_says_that_its_output_is_gone(sandbox: SyncSandbox):
    sandbox.exec("echo hello; exit 3", timeout=10, op="a")
    sandbox.acknowledge("a")
    again = sandbox.exec("echo hello; exit 3", timeout=10, op="a")
    assert (again.stdout, again.exit_code, again.replayed) == ("", 3, True)
    assert (again.truncated, again.lost) == (True, 6)


def test_one_stream_or_two_are_different_requests(sandbox: SyncSandbox):
    sandbox.exec("echo a; echo b >&2", timeout=10, op="a")
    with pytest.raises(Refused) as caught:
        sandbox.exec("echo a; echo b >&2", timeout=10, op="a", merge=True)
    assert caught.value.reason == "op_conflict"


def test_a_kill_for_memory_is_part_of_the_receipt(need_root: None, client: SyncClient):
    sandbox = client.create(Container(memory="64MiB"))
    command = "head -c 300000000 /dev/zero | tail -c 290000000 | wc -c; echo end"
    assert sandbox.exec("true", timeout=10, op="fine").oom_killed is False
    first = sandbox.exec(command, timeout=30, op="a")
    again = sandbox.exec(command, timeout=30, op="a")
    assert (first.oom_killed, again.oom_killed, again.replayed) == (True, True, True)
    # What another command did since is none of an older one's.
    assert sandbox.exec("true", timeout=10, op="fine").oom_killed is False


def test_a_large_replay_arrives_whole_and_delays_nobody(sandbox: SyncSandbox):
    command = "seq 1 1200000"
    first = sandbox.exec(command, timeout=30, op="a", cap=16 * MIB)
    assert len(first.stdout) > 8 * MIB
    results: list[str] = []

    def replay() -> None:
        results.append(sandbox.exec(command, timeout=30, op="a", cap=16 * MIB).stdout)

    threads = [threading.Thread(target=replay) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert sandbox.exec("echo x", timeout=5).stdout == "x\n"
    for thread in threads:
        thread.join()
    assert [result == first.stdout for result in results] == [True] * 4


@each_substrate
def test_a_journal_is_bounded_and_refuses_what_it_could_not_receipt(
    substrate: str, client: SyncClient, options: dict[str, Path]
):
    sandbox = client.create(Container(memory="64MiB", disk="4MiB"))
    folder = options["runtime_dir"] / sandbox.id
    refused: dict[str, Refused] = {}
    lost = 0
    for number in range(12):
        command = f"echo {number} >> /work/ran; head -c 1000000 /dev/zero"
        try:
            result = sandbox.exec(command, timeout=10, op=f"o{number}")
        except Refused as error:
            refused[str(number)] = error
            continue
        # Whoever is there gets all of it; what is kept for later is said later.
        assert (len(result.stdout), result.truncated) == (1_000_000, False)
        again = sandbox.exec(command, timeout=10, op=f"o{number}")
        assert len(again.stdout) + again.lost == 1_000_000
        assert again.truncated == (again.lost > 0)
        lost += again.lost > 0
        assert journal_size(folder) < 5 * MIB
    assert lost > 0
    assert {error.reason for error in refused.values()} == {"journal_full"}
    assert all("acknowledge" in str(error) for error in refused.values())
    ran = sandbox.files.read("ran").decode().split()
    assert ran == [str(n) for n in range(12) if str(n) not in refused]
    assert sandbox.receipt(f"o{min(refused)}").state == "never"
    for number in range(12):
        sandbox.acknowledge(f"o{number}")
    for number in refused:
        command = f"echo {number} >> /work/ran; head -c 1000000 /dev/zero"
        assert sandbox.exec(command, timeout=10, op=f"o{number}").exit_code == 0
        assert len(sandbox.exec(command, timeout=10, op=f"o{number}").stdout) == 1_000_000
        sandbox.acknowledge(f"o{number}")
    assert sandbox.receipt("o0").state == "acked"


def test_a_long_run_that_acknowledges_stays_small(
    client: SyncClient, sandbox: SyncSandbox, options: dict[str, Path]
):
    folder = options["runtime_dir"] / sandbox.id
    sizes: list[int] = []
    for number in range(80):
        sandbox.exec("head -c 300000 /dev/zero", timeout=10, op=f"o{number}")
        sandbox.acknowledge(f"o{number}")
        sizes.append(journal_size(folder))
    assert max(sizes) < 4 * MIB  # 24 MB went through it
    assert sandbox.receipt("o0").state == "acked"
    assert sandbox.exec("head -c 300000 /dev/zero", timeout=10, op="o7").lost == 300_000


def test_who_follows_a_running_operation_gets_a_beginning_and_never_a_gap(
    client: SyncClient, options: dict[str, Path]
):
    sandbox = client.create(Container(memory="64MiB", disk="1MiB"))
    command = "seq 1 300000; sleep 1.5; echo later"
    first: list[str] = []

    def run() -> None:
        try:
            sandbox.exec(command, timeout=20, op="a", cap=8 * MIB)
        except SandboxError as error:
            first.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.8)
    result = sandbox.exec(command, timeout=20, op="a", cap=8 * MIB)
    thread.join()
    assert len(first) == 1  # the line was taken over
    whole = "".join(f"{n}\n" for n in range(1, 300001)) + "later\n"
    assert 0 < len(result.stdout) < len(whole)
    assert whole.startswith(result.stdout)
    assert result.truncated
    again = sandbox.exec(command, timeout=20, op="a", cap=8 * MIB)
    assert (again.stdout, again.lost) == (result.stdout, len(whole) - len(result.stdout))


@pytest.fixture
def small_disk(need_root: None) -> Iterator[Path]:
    folder = Path(f"/run/fathom-test-small-{os.getpid()}")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=755", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def test_a_full_runtime_folder_loses_nothing_silently(small_disk: Path, cache_dir: Path):
    with SyncClient(runtime_dir=small_disk / "run", cache_dir=cache_dir) as client:
        sandbox = client.create(Container(memory="64MiB", disk="8MiB"))
        ran = lost = 0
        reasons: list[str] = []
        for number in range(8):
            command = f"echo {number} >> ran; head -c 1000000 /dev/zero"
            try:
                assert sandbox.exec(command, timeout=10, op=f"o{number}").exit_code == 0
            except Refused as error:
                reasons.append(error.reason)
                continue
            ran += 1
            again = sandbox.exec(command, timeout=10, op=f"o{number}")
            assert again.replayed
            assert len(again.stdout) + again.lost == 1_000_000
            assert again.truncated == (again.lost > 0)
            lost += again.lost > 0
        assert (ran > 1, set(reasons)) == (True, {"journal_full"})
        assert len(sandbox.files.read("ran").split()) == ran


def test_a_full_disk_costs_no_result_and_has_a_code_of_its_own(
    client: SyncClient, small_disk: Path, tmp_path: Path, cache_dir: Path
):
    sandbox = client.create(Container(memory="64MiB", disk="8MiB"))
    sandbox._sandbox._store = small_disk
    command = "head -c 6000000 /dev/zero | tr '\\0' y; exit 3"
    result = sandbox.exec(command, timeout=20, cap=10, spill=8 * MIB)
    assert (result.exit_code, result.stdout, result.truncated) == (3, "y" * 10, True)
    assert (result.spilled, "No space left" in result.spill_problem) == ((), True)
    assert list((small_disk / "output").iterdir()) == []
    # A copy of what a sandbox wrote, as of a snapshot or a layer.
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "big").write_bytes(b"x" * 6_000_000)
    door = tmp_path / "group"
    door.touch()
    group = SimpleNamespace(doors=lambda _: (str(door),))
    with pytest.raises(MachineFull, match="No space left"):
        copy_tree(str(agent.binary(cache_dir)), tmp_path, small_disk / "copy", group)  # type: ignore[arg-type]


# The journal and the death of its agent -----------------------------------------------------


class Bare:
    """An agent on this machine, without a sandbox, for what only its own death can show."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.secret = b"s" * 32
        self.folder = folder
        with socket.socket(socket.AF_UNIX) as listener:
            path = folder / "sock"
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(16)
            journal = os.open(folder / "journal", os.O_RDWR | os.O_CREAT, 0o600)
            self.process = subprocess.Popen(
                [program, "--listen-fd", "0", "--journal-fd", "1"], stdin=listener, stdout=journal
            )
            os.close(journal)
        settings: list[tuple[int, int]] = [(Tag.JOURNAL, 8 * MIB)]
        if os.geteuid() == 0:
            settings += [(Tag.UID, 65534), (Tag.GID, 65534)]
        self.ask(Frame.CONFIGURE, frames.join_fields(settings))

    def line(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.settimeout(20)
            made.connect(str(self.folder / "sock"))
        except OSError:
            made.close()
            raise
        return made

    def ask(self, kind: Frame, payload: bytes) -> Received:
        with self.line() as line:
            return box.ask(line, self.secret, kind, payload)

    def state(self, key: str) -> str:
        fields = self.ask(Frame.QUERY, frames.join_fields([(Tag.OP, key)])).fields()
        return frames.text_of(fields.get(Tag.STATE))

    def run(self, key: str, size: int) -> tuple[int, bool, int]:
        """Run an operation; return the bytes that came, whether replayed, and bytes lost."""
        fields: list[tuple[int, bytes | str | int]] = [
            (Tag.ARG, f"head -c {size} /dev/zero"),
            (Tag.ENV, "PATH=/usr/bin:/bin"),
            (Tag.CWD, "/"),
            (Tag.FLAGS, 8 | 16),
            (Tag.TIMEOUT_US, 20_000_000),
            (Tag.OP, key),
            (Tag.DIGEST, str(size)),
        ]
        got = 0
        with self.line() as line:
            payload = frames.pack(1, Frame.EXEC, frames.join_fields(fields))
            line.sendall(box.greeting(self.secret) + payload)
            splitter = frames.Splitter()
            while data := line.recv(1 << 16):
                for frame in splitter.feed(data):
                    if frame.kind == Frame.ERROR:
                        raise SandboxError(frames.text_of(frame.fields().get(Tag.CODE)))
                    if frame.kind == Frame.STDOUT:
                        got += len(frame.payload)
                    if frame.kind == Frame.EXIT:
                        end = frame.fields()
                        lost = frames.number_of(end.get(Tag.LOST))
                        return got, bool(frames.number_of(end.get(Tag.REPLAYED))), lost
        raise ConnectionResetError

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_receipts_survive_the_death_of_the_agent_at_any_time(tmp_path: Path):
    """Copies of the journal are made all the time here, and the agent killed around them."""
    program = tmp_path / "agent"
    agent.compile_to(program)
    tmp_path.chmod(0o755)
    chance = random.Random(7)
    acked: set[str] = set()
    finished: dict[str, int] = {}
    begun: set[str] = set()
    number = 0
    for life in range(10):
        bare = Bare(program, tmp_path)
        for key in finished:
            assert bare.state(key) == "finished", (life, key)
        for key in acked:
            assert bare.state(key) == "acked", (life, key)
        for key in begun - acked - finished.keys():
            assert bare.state(key) in ("finished", "lost", "acked"), (life, key)
        for key, size in finished.items():
            assert bare.run(key, size) == (size, True, 0)
        killer = threading.Timer(chance.uniform(0, 0.03), bare.kill)
        last = number + chance.randint(5, 20)
        try:
            while True:
                number += 1
                if number == last:
                    killer.start()
                key, size = f"k{number}", chance.choice([1, 70_000, 400_000])
                assert bare.run(key, size) == (size, False, 0)
                begun.add(key)
                if len(finished) < 6 and chance.random() < 0.1:
                    finished[key] = size
                    continue
                bare.ask(Frame.ACK, frames.join_fields([(Tag.OP, key)]))
                acked.add(key)
        except OSError:
            pass
        finally:
            killer.join()
        assert journal_size(tmp_path) < 9 * MIB
    assert len(acked) > 50
    assert len(finished) > 2

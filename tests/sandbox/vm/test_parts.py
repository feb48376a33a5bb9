"""The parts that need no machine: the port's lines, saved memory, the kernel's files, pictures."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import box, frames, messages
from fathom.sandbox.frames import Frame, Tag
from fathom.sandbox.vm import accel, capture, greeting, kernel, lz4, memory, saved, screen
from fathom.sandbox.vm.launch import MachineLaunch, kernel_line
from fathom.sandbox.vm.mux import Mux

SECRET = b"s" * 32


# The lines over one port ---------------------------------------------------------------------


class Guest:
    """The other end of a port: an agent, or whatever a guest that was taken over sends."""

    def __init__(self, folder: Path) -> None:
        ours, self.port = socket.socketpair()
        self.port.settimeout(10)
        self.folder = folder
        self.splitter = frames.Splitter()
        self.got: list[frames.Received] = []
        self.lost: list[str] = []
        listener = messages.listen(folder, "agent.sock")
        self.mux = Mux(listener, ours, SECRET, lambda: self.lost.append("lost"))

    def begin(self, before: bytes = b"") -> None:
        def answer() -> None:
            hello = self.receive()
            epoch = frames.join_fields([(Tag.VERSION, 1), (Tag.EPOCH, b"e" * 16)])
            self.port.sendall(before + frames.pack(hello.number, Frame.OK, epoch))

        thread = threading.Thread(target=answer)
        thread.start()
        self.mux.greet(SECRET, 10)
        thread.join()
        self.mux.start()

    def receive(self) -> frames.Received:
        while not self.got:
            data = self.port.recv(1 << 16)
            assert data
            self.got += self.splitter.feed(data)
        return self.got.pop(0)

    def client(self) -> socket.socket:
        made = messages.connect(self.folder, "agent.sock")
        made.settimeout(10)
        made.sendall(box.greeting(SECRET))
        return made

    def close(self) -> None:
        self.mux.close()
        self.port.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.close()


def answer_to(asked: frames.Received) -> bytes:
    return frames.pack(asked.number, Frame.OK, asked.payload)


def read_until(line: socket.socket, kind: Frame) -> list[frames.Received]:
    splitter, found = frames.Splitter(), []
    while not any(frame.kind == kind for frame in found):
        data = line.recv(1 << 16)
        if not data:
            break
        found += splitter.feed(data)
    return found


def test_numbers_of_lines_do_not_mix(guest: Guest):
    guest.begin()
    with guest.client() as one, guest.client() as other:
        for line in (one, other):
            line.sendall(frames.pack(1, Frame.PING, b"x"))
        first, second = guest.receive(), guest.receive()
        assert first.number != second.number
        guest.port.sendall(frames.pack(second.number, Frame.OK, b"second"))
        guest.port.sendall(frames.pack(first.number, Frame.OK, b"first"))
        answers = set[bytes]()
        for line in (one, other):
            own = b""  # behind the greeting, which is an OK as well
            while own not in (b"first", b"second"):
                own = read_until(line, Frame.OK)[-1].payload
            answers.add(own)
        assert answers == {b"first", b"second"}


def test_what_a_former_host_left_is_skipped(guest: Guest):
    half = frames.pack(9, Frame.STDOUT, b"y" * 5000)
    forged = frames.pack(5, Frame.OK, b"forged")
    guest.begin(before=half[700:] + forged + half)
    with guest.client() as line:
        found = read_until(line, Frame.OK)
        assert found[0].fields()[Tag.EPOCH] == b"e" * 16


def test_a_guest_that_sends_everything_but_an_answer_is_refused(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
):
    """What it sent is not kept meanwhile: a guest can send without end."""
    monkeypatch.setattr(greeting, "_MOST_SKIPPED", 24 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def flood() -> None:
        with contextlib.suppress(OSError):
            while True:
                guest.port.sendall(os.urandom(1 << 20))

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    with pytest.raises(SandboxError, match="everything but an answer"):
        guest.mux.greet(SECRET, 60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 << 10
    guest.mux.close()
    thread.join(10)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.touch(),
    ],
    ids=["pipe", "folder", "link", "nothing"],
)
def test_a_saved_state_that_is_no_plain_file(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "state")
    with pytest.raises((SandboxError, OSError)):
        capture.take_file(tmp_path, "state")


def test_a_line_that_closes_ends_its_commands(guest: Guest):
    guest.begin()
    line = guest.client()
    line.sendall(frames.pack(3, Frame.EXEC, b""))
    started = guest.receive()
    assert started.kind == Frame.EXEC
    line.close()
    left = guest.receive()
    assert (left.kind, left.number) == (Frame.LEAVE, started.number)


def test_a_slow_reader_is_held_and_let_go(guest: Guest):
    guest.begin()
    with guest.client() as line:
        line.sendall(frames.pack(3, Frame.EXEC, b""))
        number = guest.receive().number
        piece = frames.pack(number, Frame.STDOUT, b"z" * 60000)
        sent = 0
        guest.port.setblocking(False)
        held: frames.Received | None = None
        deadline = time.monotonic() + 20
        while held is None:
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                sent += guest.port.send(piece[sent % len(piece) :])
            with contextlib.suppress(BlockingIOError):
                found = guest.splitter.feed(guest.port.recv(1 << 16))
                held = found[0] if found else None
        assert (held.kind, held.number) == (Frame.HOLD, number)
        assert frames.number_of(held.fields()[Tag.STATE]) == 1
        guest.port.settimeout(10)
        taken = 0
        while taken < sent - 100_000:
            taken += len(line.recv(1 << 18))
        assert frames.number_of(guest.receive().fields()[Tag.STATE]) == 0


@pytest.mark.parametrize(
    "hostile",
    [
        b"\xff" * 64,
        struct.pack("<IIBBH", (1 << 20) + 1, 1, Frame.OK, 1, 0xF47A),
        frames.pack(1, Frame.OK)[:-1] + b"\0",
        b"\0" * 4096,
    ],
    ids=["noise", "too long", "no magic", "zeros"],
)
def test_a_guest_that_sends_no_frames_is_lost(guest: Guest, hostile: bytes):
    guest.begin()
    with guest.client() as line:
        read_until(line, Frame.OK)
        guest.port.sendall(hostile)
        assert line.recv(10) == b""
    with pytest.raises(SandboxLost):
        guest.mux.ask(Frame.PING, timeout=5)


def test_forged_answers_of_a_guest_reach_nobody(guest: Guest):
    """A guest that was taken over may answer what was asked of it, and nothing else."""
    guest.begin()
    with guest.client() as line:
        read_until(line, Frame.OK)
        for number in (0, 77, 1 << 20, 0xFFFFFFFF):
            for kind in (Frame.EXIT, Frame.STDOUT, Frame.OK, Frame.EXEC, 250):
                guest.port.sendall(frames.pack(number, kind, b"forged"))
        line.sendall(frames.pack(8, Frame.PING, b"?"))
        asked = guest.receive()
        guest.port.sendall(frames.pack(asked.number, Frame.OK, b"true"))
        assert [frame.payload for frame in read_until(line, Frame.OK)] == [b"true"]


@pytest.mark.parametrize(
    "first",
    [
        box.greeting(b"w" * 32),
        box.greeting(b""),
        frames.pack(1, Frame.HELLO, b"\x01\xff"),
        frames.pack(1, Frame.EXEC, b"x"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_no_stranger_that_hangs_up_ends_the_lines(guest: Guest, first: bytes):
    guest.begin()
    for _ in range(20):
        with messages.connect(guest.folder, "agent.sock") as stranger:
            stranger.sendall(first)
    with guest.client() as line:
        line.sendall(frames.pack(1, Frame.PING, b"x"))
        asked = guest.receive()
        guest.port.sendall(frames.pack(asked.number, Frame.OK, b"here"))
        own = b""
        while own != b"here":
            own = read_until(line, Frame.OK)[-1].payload
    assert guest.lost == []


def served(guest: Guest, line: socket.socket) -> bool:
    """Whether what a line asks for reaches the guest, and the answer comes back."""
    line.sendall(frames.pack(1, Frame.PING, b"x"))
    asked = guest.receive()
    guest.port.sendall(frames.pack(asked.number, Frame.OK, b"here"))
    found: list[frames.Received] = []
    while not any(frame.payload == b"here" for frame in found):
        found = read_until(line, Frame.OK)
        if not found:
            return False
    return True


def test_strangers_who_say_nothing_make_room_for_others(guest: Guest):
    guest.begin()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(messages.connect(guest.folder, "agent.sock"))
        assert served(guest, stack.enter_context(guest.client()))


def test_whoever_comes_while_nothing_is_taken_waits(guest: Guest):
    """As a machine is copied: none of a crowd is sent away."""
    guest.begin()
    threading.Thread(
        target=lambda: guest.port.sendall(answer_to(guest.receive())), daemon=True
    ).start()
    assert guest.mux.hush(10)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(guest.client()) for _ in range(100)]
        time.sleep(0.1)
        guest.mux.go_on()
        assert all(served(guest, line) for line in crowd)


def test_more_lines_than_are_carried_wait(guest: Guest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fathom.sandbox.vm.mux._MOST_LINES", 3)
    guest.begin()
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(guest.client()) for _ in range(6)]
        for line in lines:
            assert served(guest, line)
            line.close()


def test_a_mistake_about_one_line_is_not_the_others_end(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
):
    guest.begin()
    plain, bad = guest.mux._take, []

    def take(line: object, frame: frames.Received) -> None:
        if frame.kind == Frame.QUERY:
            bad.append(frame)
            raise RuntimeError("a mistake")
        plain(line, frame)  # type: ignore[arg-type]

    monkeypatch.setattr(guest.mux, "_take", take)
    with guest.client() as one, guest.client() as other:
        one.sendall(frames.pack(1, Frame.QUERY, b""))
        assert read_until(one, Frame.EXIT)[-1].kind == Frame.OK  # the greeting, then the end
        other.sendall(frames.pack(1, Frame.PING, b"x"))
        assert guest.receive().kind == Frame.PING
    assert len(bad) == 1
    assert guest.lost == []


def test_a_thread_that_fails_ends_the_machine(guest: Guest, monkeypatch: pytest.MonkeyPatch):
    guest.begin()

    def fail() -> None:
        raise RuntimeError("a mistake")

    with guest.client() as line:
        read_until(line, Frame.OK)
        monkeypatch.setattr(guest.mux, "_receive", fail)
        guest.port.sendall(frames.pack(99, Frame.OK))
        assert read_until(line, Frame.EXIT) == []  # the end of the line
    with pytest.raises(SandboxLost, match="RuntimeError"):
        guest.mux.ask(Frame.PING)
    assert guest.lost == ["lost"]
    guest.mux.close()
    assert guest.lost == ["lost"]


def test_closing_is_no_loss(guest: Guest):
    guest.begin()
    guest.mux.close()
    assert guest.lost == []


def test_a_guest_that_ends_is_told_to_who_waits(guest: Guest):
    guest.begin()
    threading.Timer(0.2, guest.port.close).start()
    with pytest.raises(SandboxLost):
        guest.mux.ask(Frame.PING, timeout=10)


def test_a_refused_beginning(guest: Guest):
    def refuse() -> None:
        number = guest.receive().number
        said = frames.join_fields([(Tag.CODE, "auth"), (Tag.MESSAGE, "wrong secret")])
        guest.port.sendall(frames.pack(number, Frame.ERROR, said))

    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises(SandboxError, match="wrong secret"):
        guest.mux.greet(SECRET, 10)
    thread.join()
    with pytest.raises(SandboxError, match="did not answer within"):
        guest.mux.greet(SECRET, 0.2)


def test_a_guest_that_does_not_answer_can_be_stopped_all_the_same(guest: Guest):
    guest.begin()
    began = time.monotonic()
    assert not guest.mux.hush(0.2)
    assert time.monotonic() - began < 2
    with guest.client() as line:
        line.sendall(frames.pack(1, Frame.PING, b"held back"))
        guest.mux.go_on()
        # What the node asked comes first, then what a client said meanwhile.
        assert [guest.receive().payload for _ in range(2)] == [b"", b"held back"]
    threading.Thread(
        target=lambda: guest.port.sendall(frames.pack(guest.receive().number, Frame.OK))
    ).start()
    assert guest.mux.hush(10)


def test_a_guest_gives_the_node_one_answer_and_no_more(guest: Guest):
    guest.begin()
    flood = 200

    def answer() -> None:
        number = guest.receive().number
        for _ in range(flood):
            guest.port.sendall(frames.pack(number, Frame.STDOUT, bytes(1 << 20)))

    thread = threading.Thread(target=answer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    thread.start()
    guest.mux.ask(Frame.PING, timeout=10)
    thread.join(30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < flood << 8
    assert not guest.lost


def test_a_guest_that_floods_its_port_is_ended(guest: Guest):
    guest.begin()
    stray = frames.pack(0x7FFFFFFF, Frame.STDOUT) * 1000
    with contextlib.suppress(OSError):
        for _ in range(1000):
            guest.port.sendall(stray)
    deadline = time.monotonic() + 10
    while not guest.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert guest.lost


# Saved memory --------------------------------------------------------------------------------


def test_memory_is_copied_with_its_holes_and_sealed():
    source, target = memory.create(64 << 20), memory.create(0)
    try:
        os.pwrite(source, b"a" * 9000, 4096)
        os.pwrite(source, b"z", (64 << 20) - 1)
        memory.copy_sparse(source, target, 64 << 20)
        assert os.pread(target, 9000, 4096) == b"a" * 9000
        assert os.pread(target, 1, (64 << 20) - 1) == b"z"
        assert os.fstat(target).st_size == 64 << 20
        assert os.fstat(target).st_blocks * 512 < 64 << 10
        memory.seal(target)
        for harm in (lambda: os.pwrite(target, b"x", 0), lambda: os.ftruncate(target, 1)):
            with pytest.raises(PermissionError):
                harm()
    finally:
        os.close(source)
        os.close(target)


@pytest.mark.usefixtures("need_root")
def test_only_what_a_process_wrote_itself_is_taken():
    base, target = memory.create(1 << 20), memory.create(0)
    os.pwrite(base, b"base" * 1024, 0)
    memory.seal(base)
    code = (
        "import mmap, sys; m = mmap.mmap(int(sys.argv[1]), 1 << 20, flags=mmap.MAP_PRIVATE, "
        "prot=mmap.PROT_READ | mmap.PROT_WRITE); m[40960:40963] = b'own'; m[0]; "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["python3", "-c", code, str(base)],
        pass_fds=(base,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert memory.save(process.pid, base, target, 1 << 20) == [(10, 1)]
        process.kill()
    assert os.pread(target, 4, 0) == b"base"
    assert os.pread(target, 3, 40960) == b"own"
    assert os.pread(base, 3, 40960) == b"\0\0\0"
    os.close(base)
    os.close(target)


def test_a_shelf_holds_few_and_lends(tmp_path: Path):
    shelf = saved.Shelf()
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        fd = memory.create(8192)
        memory.seal(fd)
        one = saved.Saved(memory=fd, size=8192, state=b"s", secret=b"k" * 32)
        one.write(folder, {"substrate": "microvm"})
        one.close()
        lease = shelf.template(folder)
        assert (lease.state, lease.secret) == (b"s", b"k" * 32)
        lease.close()
    with pytest.raises(SandboxError, match="fork again"):
        shelf.get("gone")
    for name in list(shelf._held):
        shelf.drop(name)


# The guest's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"a", b"abc" * 5000, os.urandom(70000), bytes(300000)])
def test_lz4_is_what_the_lz4_program_writes(data: bytes, tmp_path: Path):
    program = shutil.which("lz4")
    if program is None:
        pytest.skip("lz4 is not installed")
    (tmp_path / "x").write_bytes(data)
    subprocess.run([program, "-l", "-q", str(tmp_path / "x"), str(tmp_path / "y")], check=True)
    assert lz4.decompress_legacy((tmp_path / "y").read_bytes()) == data


def test_lz4_by_hand_and_damaged():
    # Three literals, then a match of 8 bytes at distance 3, then one literal.
    block = bytes([0x34]) + b"abc" + bytes([3, 0]) + bytes([0x10]) + b"!"
    assert lz4.decompress_block(block) == b"abc" + b"abcabcab" + b"!"
    assert lz4.decompress_legacy(lz4.LEGACY_MAGIC + len(block).to_bytes(4, "little") + block) == (
        b"abcabcabcab!"
    )
    for bad in (block[:5], bytes([0x34]) + b"abc" + bytes([9, 0]), bytes([0xF0])):
        with pytest.raises(SandboxError):
            lz4.decompress_block(bad)
    with pytest.raises(SandboxError):
        lz4.decompress_legacy(b"nothing")


def test_a_kernel_that_is_none_is_refused():
    for image in (b"", b"\0" * 4096, bytes(0x1FE) + b"\x55\xaa" + bytes(4096)):
        with pytest.raises(SandboxError):
            kernel.extract(image)


def test_modules_come_after_what_they_need(tmp_path: Path):
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc.ko\n")
    for name, needs in {"a": "b,crc", "b": "c-d", "c-d": ""}.items():
        (tmp_path / f"{name}.ko").write_bytes(
            b"\x7fELF\0license=GPL\0depends=%b\0" % needs.encode()
        )
    names = [path.name for path in kernel.module_order(tmp_path, ("a", "c_d"))]
    assert names == ["c-d.ko", "b.ko", "a.ko"]
    with pytest.raises(SandboxError, match="no module x"):
        kernel.module_order(tmp_path, ("x",))


def test_the_initramfs_is_what_cpio_reads(tmp_path: Path):
    program = shutil.which("cpio")
    parts = [("dev", 0o40755, b""), ("init", 0o100755, b"program"), ("m", 0o100644, b"x" * 5)]
    data = b"".join(kernel._cpio(parts))
    assert data.startswith(b"070701")
    assert data.count(b"TRAILER!!!") == 1
    if program is None:
        pytest.skip("cpio is not installed")
    listed = subprocess.run([program, "-t", "--quiet"], input=data, capture_output=True, check=True)
    assert listed.stdout.decode().split() == ["dev", "dev/console", "init", "m"]


def test_a_rate_that_was_told_is_told_to_the_guest():
    assert accel.tsc_khz() == 0 or 100_000 < accel.tsc_khz() < 10_000_000
    launch = MachineLaunch(
        folder=Path("/x"),
        substrate="microvm",
        accelerator="tcg",
        agent="",
        tree="",
        kernel="",
        initramfs="",
        base="",
        memory=1,
        disk=77,
        cpus=1,
        cpu=None,
        hostname="h",
        uid=1,
        tsc_khz=2_000_000,
    )
    words = kernel_line(launch).split()
    assert {"tsc_early_khz=2000000", "fathom.writes=77", "fathom.hostname=h"} <= set(words)


# Pictures ------------------------------------------------------------------------------------


def test_a_picture_is_the_same_as_png():
    dots = bytes(range(18))
    assert screen.parse_ppm(b"P6\n3 2\n255\n" + dots) == (3, 2, dots)
    data = screen.png(3, 2, dots)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    at = data.index(b"IDAT")
    (size,) = struct.unpack(">I", data[at - 4 : at])
    rows = zlib.decompress(data[at + 4 : at + 4 + size])
    assert rows == b"\0" + dots[:9] + b"\0" + dots[9:]


@pytest.mark.parametrize(
    "data", [b"", b"P6\n3 2\n255\nshort", b"P5\n1 1\n255\nx", b"P6\n99999 99999\n255\n"]
)
def test_a_picture_that_is_none_is_refused(data: bytes):
    with pytest.raises(SandboxError):
        screen.parse_ppm(data)

"""What a tenant may try against the agent, its line, its receipts, and through copies of itself."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import Container, SyncClient, SyncSandbox, box, frames, messages, state
from fathom.sandbox.frames import Frame, Tag
from fathom.sandbox.substrates.choice import suited

each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)
TIMEOUT = 30.0


def fails(sandbox: SyncSandbox, command: str) -> str:
    result = sandbox.exec(command, timeout=TIMEOUT, merge=True)
    assert result.exit_code != 0, f"{command} worked: {result.output}"
    return result.output


@pytest.fixture
def python(client: SyncClient) -> SyncSandbox:
    return client.create(Container(image="python"))


@pytest.fixture
def need_copies(sandbox: SyncSandbox) -> None:
    if not sandbox.caps.fork:
        pytest.skip("no copies here")


# The agent and its line ----------------------------------------------------------------------


@each_substrate
def test_the_agent_survives_every_signal(sandbox: SyncSandbox):
    for name in ("KILL", "STOP", "TERM", "INT", "SEGV", "HUP", "USR1", "TSTP", "QUIT"):
        sandbox.exec(f"kill -{name} 1; kill -{name} -1; kill -{name} $PPID", timeout=5)
    assert sandbox.exec("echo alive", timeout=TIMEOUT).stdout == "alive\n"


@each_substrate
def test_no_file_of_the_agent_can_be_opened(sandbox: SyncSandbox):
    for name in ("mem", "maps", "environ", "fd/10", "fd/11", "cwd/", "root/", "auxv", "stack"):
        fails(sandbox, f"head -c 1 /proc/1/{name} 2>&1 || ls /proc/1/{name}; exit 1")
    assert sandbox.exec("ls /proc/1/fd", timeout=TIMEOUT).stdout == ""
    fails(sandbox, "echo x > /proc/1/comm && grep -q x /proc/1/comm")
    fails(sandbox, "echo 1000 > /proc/1/oom_score_adj")


@each_substrate
def test_neither_socket_nor_journal_has_a_path_inside(sandbox: SyncSandbox):
    sandbox.exec("echo secret-of-an-operation", timeout=TIMEOUT, op="secret/1")
    found = sandbox.exec(
        "find / -xdev \\( -type s -o -name journal -o -name 'agent.sock*' -o -name session.json \\)"
        " 2>/dev/null; cat /proc/net/unix | grep -c agent.sock; grep -rls secret-of-an /tmp /dev",
        timeout=60,
    )
    assert found.stdout in ("0\n", "")


def test_forged_frames_are_plain_output(python: SyncSandbox):
    """Output travels beside the agent's own messages: it must never become one."""
    forged = frames.pack(1, Frame.EXIT, frames.join_fields([(Tag.EXIT, 0)]))
    forged += frames.pack(1, Frame.OK) + frames.pack(0, Frame.EXIT)
    code = f"import os; os.write(1, {forged!r}); os.write(2, {forged!r}); raise SystemExit(9)"
    result = python.exec(["python3", "-c", code], timeout=TIMEOUT)
    assert result.exit_code == 9
    assert result.stdout == forged.decode(errors="replace")


def line_to(options: dict[str, Path], sandbox: SyncSandbox) -> socket.socket:
    made = messages.connect(options["runtime_dir"] / sandbox.id, state.SOCKET)
    made.settimeout(10)
    return made


HELLO_WRONG = box.greeting(b"w" * 32)


@pytest.mark.parametrize(
    "first",
    [
        HELLO_WRONG,
        box.greeting(b""),
        box.greeting(b"x" * 200),
        frames.pack(1, Frame.EXEC, frames.join_fields([(Tag.ARG, "id")])),
        frames.pack(1, Frame.CONFIGURE, frames.join_fields([(Tag.UID, 0)])),
        frames.pack(1, Frame.REKEY, frames.join_fields([(Tag.SECRET, b"n" * 32)])),
        frames.pack(0, Frame.HELLO, b"\xff" * 4097),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 4096,
        HELLO_WRONG + frames.pack(1, Frame.QUERY, frames.join_fields([(Tag.OP, "x")])),
    ],
    ids=lambda data: repr(data[:14]),
)
def test_a_stranger_on_the_line_gets_nothing(
    sandbox: SyncSandbox, options: dict[str, Path], first: bytes
):
    with line_to(options, sandbox) as line:
        line.sendall(first)
        line.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while data := line.recv(4096):
                answer += data
    kinds = {frame.kind for frame in frames.Splitter().feed(answer)}
    assert kinds <= {Frame.ERROR}
    assert sandbox.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def test_strangers_who_say_nothing_do_not_lock_others_out(
    sandbox: SyncSandbox, options: dict[str, Path]
):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(line_to(options, sandbox))
        assert sandbox.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def test_the_agent_is_configured_once(sandbox: SyncSandbox, options: dict[str, Path]):
    """Whoever had the secret still could not give commands more rights than they have."""
    session = (options["runtime_dir"] / sandbox.id / state.SESSION).read_text()
    secret = bytes.fromhex(session.split('"secret": "')[1].split('"')[0])
    with line_to(options, sandbox) as line, pytest.raises(SandboxError, match="configured before"):
        box.ask(line, secret, Frame.CONFIGURE, frames.join_fields([(Tag.UID, 0)]))
    assert sandbox.exec("id -u", timeout=TIMEOUT).stdout == "1000\n"


@each_substrate
def test_the_session_s_files_are_closed_to_others(sandbox: SyncSandbox, options: dict[str, Path]):
    folder = options["runtime_dir"] / sandbox.id
    for name in (state.SOCKET, state.JOURNAL, state.SESSION):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_nonsense_with_the_right_secret_ends_the_line_only(
    sandbox: SyncSandbox, options: dict[str, Path]
):
    session = (options["runtime_dir"] / sandbox.id / state.SESSION).read_text()
    secret = bytes.fromhex(session.split('"secret": "')[1].split('"')[0])
    hostile = [
        frames.pack(7, Frame.EXEC, b"\xff" * 50),
        frames.pack(7, Frame.EXEC, frames.join_fields([(Tag.ARG, "x"), (Tag.TIMEOUT_US, 0)])),
        frames.pack(7, Frame.STDIN, b"x"),
        frames.pack(7, Frame.SIGNAL, b"\x2c\xff\xff\xff\xff"),
        frames.pack(7, Frame.RESIZE, b""),
        frames.pack(7, 200, b"?"),
        frames.pack(7, Frame.ACK, b""),
        frames.pack(7, Frame.SHIFT, b""),
        b"\xff" * 64,
    ]
    for data in hostile:
        with line_to(options, sandbox) as line:
            line.sendall(box.greeting(secret) + data)
            line.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while line.recv(4096):
                    pass
    assert sandbox.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


# Exhausting the agent ------------------------------------------------------------------------


def test_more_commands_than_processes_are_refused_one_by_one(client: SyncClient):
    sandbox = client.create(Container(pids=12))
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(sandbox.run(["sleep", "20"], timeout=60))
        # They start one after another; the one that finds no room says so.
        deadline = time.monotonic() + 15
        said = ""
        while not said and time.monotonic() < deadline:
            try:
                sandbox.exec("true", timeout=1)
            except SandboxError as error:
                said = str(error)
        assert "raise pids or memory" in said
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(SandboxError):
            if sandbox.exec("echo fine", timeout=10).stdout == "fine\n":
                break
        assert time.monotonic() < deadline


def test_a_memory_bomb_spares_the_agent(client: SyncClient):
    if suited() == ("bubblewrap",):
        pytest.skip("memory is not bounded for the whole sandbox here")
    sandbox = client.create(Container(memory="32MiB"))
    for _ in range(3):
        bomb = "for i in 1 2 3 4; do head -c 200M /dev/zero | tail -c 200M & done; wait"
        assert sandbox.exec(bomb, timeout=TIMEOUT).oom_killed
    assert sandbox.exec("echo alive", timeout=TIMEOUT).stdout == "alive\n"


def test_a_flood_of_files_hits_a_bound(client: SyncClient):
    sandbox = client.create(Container(disk="4MiB", image="python"))
    if not sandbox.caps.fork:
        pytest.skip("files are counted by memory here")
    flood = "for i in range(20000):\n    open(f'/work/{i}', 'w').close()"
    assert "No space" in fails(sandbox, f'python3 -c "{flood}" 2>&1 | tail -1; exit 1')


def test_output_under_a_key_is_bounded(sandbox: SyncSandbox, options: dict[str, Path]):
    result = sandbox.exec("yes", timeout=1, cap=1000, op="flood/1")
    assert result.timed_out
    assert (options["runtime_dir"] / sandbox.id / state.JOURNAL).stat().st_size < 10_000


# Identity and leftovers ----------------------------------------------------------------------


@each_substrate
def test_nothing_outside_of_the_writable_folders_can_be_written(sandbox: SyncSandbox):
    """Whatever permissions an image gives, and whoever the tenant is for it."""
    found = sandbox.exec(
        "find / -xdev -type d -writable -not -path '/proc/*' 2>/dev/null; "
        "find / -xdev -type f -writable -not -path '/proc/*' 2>/dev/null",
        timeout=60,
    )
    allowed = {"/work", "/tmp", "/dev/shm", "/var/tmp"}
    assert set(found.stdout.split()) <= allowed


def test_hard_links_lead_nowhere(client: SyncClient, tmp_path: Path):
    if os.geteuid():
        pytest.skip("needs a file of another user")
    (tmp_path / "of_root").write_text("secret")
    (tmp_path / "of_root").chmod(0o600)
    os.chown(tmp_path, 4321, 4321)
    sandbox = client.create(Container(workdir=tmp_path))
    sandbox.exec("ln of_root mine; cp -l of_root mine2; ln /etc/passwd p", timeout=TIMEOUT)
    for name in ("mine", "mine2"):
        with pytest.raises(SandboxError):
            sandbox.files.read(name)
        with contextlib.suppress(SandboxError):
            sandbox.files.write(name, b"owned")
    assert (tmp_path / "of_root").read_text() == "secret"
    assert (tmp_path / "of_root").stat().st_nlink == 1


def test_a_removed_tree_never_leads_out(client: SyncClient, tmp_path: Path):
    """A folder that becomes a link while it is being removed."""
    work, outside = tmp_path / "work", tmp_path / "outside"
    for folder in (work, outside):
        folder.mkdir()
        folder.chmod(0o777)
    tmp_path.chmod(0o777)
    (outside / "precious").write_text("kept")
    (outside / "precious").chmod(0o666)
    sandbox = client.create(Container(workdir=work))
    swap = (
        "while :; do mkdir -p t/d; touch t/d/f; rm -rf t/d 2>/dev/null; "
        f"ln -sfn {outside} t/d 2>/dev/null; rm -f t/d 2>/dev/null; done"
    )
    sandbox.exec(f"({swap}) > /dev/null 2>&1 &", timeout=TIMEOUT)
    for _ in range(25):
        with contextlib.suppress(SandboxError):
            sandbox.files.remove("t")
        with contextlib.suppress(SandboxError):
            sandbox.files.rename("t", "t2")
    assert (outside / "precious").read_text() == "kept"


@pytest.mark.usefixtures("need_copies")
def test_hostile_files_are_copied_as_they_are(sandbox: SyncSandbox):
    """A copy is made by root: nothing of it may be opened, followed or given other rights."""
    sandbox.exec(
        "mkfifo pipe; truncate -s 1G sparse; ln -s /etc/shadow link; ln -s . loop; "
        "touch -- -rf '--help' \"$(printf 'a\\nb')\"; mkdir -p d/d/d; chmod 0 d/d; "
        "mknod w c 0 0; mknod z c 1 5",
        timeout=TIMEOUT,
    )
    started = time.monotonic()
    (copy,) = sandbox.fork()
    assert time.monotonic() - started < 20
    shown = copy.exec("ls -1A; readlink link; test -p pipe && stat -c %s sparse", timeout=TIMEOUT)
    assert "/etc/shadow" in shown.stdout
    assert str(1 << 30) in shown.stdout
    kinds = copy.exec("find /work /tmp -type b -o -type c -o -perm /6000", timeout=TIMEOUT)
    assert kinds.stdout == ""
    fails(copy, "cat link")


@pytest.mark.usefixtures("need_copies")
def test_a_copy_does_not_know_its_origin_s_secret(sandbox: SyncSandbox, options: dict[str, Path]):
    (copy,) = sandbox.fork()
    secrets = {
        (options["runtime_dir"] / one.id / state.SESSION).read_text().split('"secret": "')[1][:64]
        for one in (sandbox, copy)
    }
    assert len(secrets) == 2
    epochs = {one.receipt("x").epoch for one in (sandbox, copy)}
    assert len(epochs) == 2
    copy.stop()
    with pytest.raises(SandboxLost):
        copy.exec("true", timeout=5)
    assert sandbox.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def test_privileges_cannot_be_stored_in_a_file(python: SyncSandbox):
    code = """
import os
open("/work/f", "w").close()
for name, value in (("security.capability", b"\\1\\0\\0\\2" + b"\\xff" * 16),
                    ("trusted.overlay.opaque", b"y"), ("trusted.x", b"y")):
    try:
        os.setxattr("/work/f", name, value)
        print(name)
    except OSError:
        pass
"""
    assert python.exec(["python3", "-c", code], timeout=TIMEOUT).output == ""


def test_shared_memory_and_queues_are_each_sandbox_s_own(client: SyncClient):
    make = "import ctypes; print(ctypes.CDLL(None).shmget(4711, 4096, {}))"
    one, other = (client.create(Container(image="python")) for _ in range(2))
    made = one.exec(["python3", "-c", make.format("0o1666")], timeout=TIMEOUT).stdout
    assert int(made) >= 0
    seen = other.exec(["python3", "-c", make.format("0o666")], timeout=TIMEOUT).stdout
    assert int(seen) == -1


@each_substrate
def test_terminals_of_others_are_not_there(client: SyncClient):
    one, other = client.create(Container()), client.create(Container())
    with one.pty(["cat"], timeout=TIMEOUT) as process:
        process.write("x\n")
        assert process.read() is not None
        assert other.exec("ls /dev/pts | grep -v ptmx", timeout=TIMEOUT).stdout in ("", "0\n")
        fails(other, "echo owned > /dev/pts/0")


@each_substrate
def test_a_crash_leaves_no_core_and_calls_no_helper(sandbox: SyncSandbox):
    sandbox.exec("ulimit -c unlimited; kill -SEGV $$", timeout=TIMEOUT)
    assert sandbox.exec("ulimit -c; find /work /tmp -name '*core*'", timeout=TIMEOUT).stdout == (
        "0\n"
    )


@each_substrate
def test_control_groups_cannot_be_reached(sandbox: SyncSandbox):
    """The release agent of a control group would be a program that the host's root runs."""
    fails(sandbox, "ls /sys/fs/cgroup/* 2>/dev/null | grep .")
    fails(sandbox, "mkdir /tmp/c && mount -t cgroup -o memory x /tmp/c")
    fails(sandbox, "find / -name release_agent -o -name cgroup.procs 2>/dev/null | grep .")

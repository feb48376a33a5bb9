"""Running commands: results, limits of time and output, and arguments that make no sense."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import Client, Container, SyncClient, SyncSandbox


def test_results(shared: SyncSandbox):
    result = shared.exec("echo out; echo err >&2; exit 7", timeout=10)
    assert (result.exit_code, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert result.output == "out\nerr\n"
    assert (result.timed_out, result.oom_killed, result.truncated) == (False, False, False)
    assert 0 < result.duration < 10


def test_merged_output_keeps_the_order_of_arrival(shared: SyncSandbox):
    command = "for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; done"
    result = shared.exec(command, timeout=10, merge=True)
    assert result.output == "".join(f"out{i}\nerr{i}\n" for i in range(1, 6))
    assert (result.stdout, result.stderr) == (result.output, "")


def test_lists_are_arguments_and_never_a_shell_line(shared: SyncSandbox):
    words = ["a b", "$HOME", "*", "'", '"', "-e", ";", "", "\n", "\u00e9"]
    result = shared.exec(["printf", "<%s>", *words], timeout=10)
    assert result.stdout == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("true", 0),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("no-such-program", 127),
        ("/etc/passwd", 126),
        (["no-such-program"], 127),
        (["/etc"], 126),
        (["sh", "-c", "exit 3"], 3),
    ],
)
def test_exit_codes(shared: SyncSandbox, command: str | list[str], code: int):
    assert shared.exec(command, timeout=10).exit_code == code


def test_environment_is_fixed_and_nothing_of_the_host_gets_in(
    client: SyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FATHOM_TEST_SECRET", "leaked")
    monkeypatch.setenv("LD_PRELOAD", "")
    sandbox = client.create(Container())
    shown = sandbox.exec(["env"], timeout=10).stdout.splitlines()
    names = {line.partition("=")[0] for line in shown}
    expected = "PATH HOME USER LOGNAME SHELL LANG TZ TERM PWD SHLVL _".split()
    assert names <= set(expected)
    assert {"LANG=C.UTF-8", "TZ=UTC", "HOME=/work", "PATH=/usr/local/bin:/usr/bin:/bin"} <= set(
        shown
    )


def test_the_locale_is_utf8_and_the_clock_utc(shared: SyncSandbox):
    command = "printf '\u00e9' | wc -m; date +%Z; printf 'b\\nB\\na\\n' | sort | tr -d '\\n'"
    assert shared.exec(command, timeout=10).stdout == "1\nUTC\nBab"


def test_given_variables_and_folder(shared: SyncSandbox):
    shared.exec("mkdir -p sub/x", timeout=10)
    result = shared.exec('pwd; echo "$A"', timeout=10, cwd="sub/x", env={"A": "b c"})
    assert result.stdout == "/work/sub/x\nb c\n"
    assert shared.exec("pwd", timeout=10).stdout == "/work\n"
    assert shared.exec("pwd", timeout=10, cwd="/tmp").stdout == "/tmp\n"


def test_stdin_is_empty_or_given(shared: SyncSandbox):
    assert shared.exec("cat; echo end", timeout=10).stdout == "end\n"
    assert shared.exec("cat", timeout=10, stdin="text").stdout == "text"
    data = os.urandom(3 << 20)
    result = shared.exec("wc -c; sha256sum", timeout=10, stdin=data)
    assert result.stdout.split()[0] == str(len(data))
    assert shared.exec("cat /dev/stdin", timeout=10, stdin=b"x").stdout == "x"


def test_standard_streams_can_be_opened_by_name(shared: SyncSandbox):
    result = shared.exec(
        "echo a > /dev/stdout; echo b > /dev/stderr; env echo c | tee /dev/fd/2", timeout=10
    )
    assert (result.stdout, result.stderr) == ("a\nc\n", "b\nc\n")


def test_signals_have_their_ordinary_meaning(shared: SyncSandbox):
    """Python ignores SIGPIPE, and what is ignored stays so in every program that it starts."""
    assert shared.exec("yes | head -1; echo ${PIPESTATUS[*]}", timeout=10).stdout == "y\n141 0\n"
    ignored = shared.exec("grep -E 'SigIgn|SigBlk' /proc/self/status", timeout=10).stdout
    assert {int(line.split()[1], 16) for line in ignored.splitlines()} == {0}


IGNORING = """
import ctypes, signal, struct
from fathom.sandbox import Container, SyncClient
for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
call = {"x86_64": 13, "aarch64": 134}[__import__("os").uname().machine]
ignore = ctypes.create_string_buffer(struct.pack("QQQQ", 1, 0, 0, 0))
assert ctypes.CDLL(None).syscall(call, 32, ignore, None, 8) == 0  # the C library refuses
with SyncClient("local") as client:
    sandbox = client.create(Container())
    print(sandbox.exec("grep SigIgn /proc/self/status", timeout=10).stdout)
"""


def test_what_the_caller_ignores_is_not_ignored_inside():
    """As under nohup, a background shell, or a supervisor with habits of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IGNORING], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["SigIgn:", "0" * 16], done.stderr


def test_undecodable_output_is_replaced(shared: SyncSandbox):
    assert shared.exec(r"printf 'a\xffb'", timeout=10).stdout == "a\ufffdb"


def test_state_lives_from_command_to_command(shared: SyncSandbox):
    shared.exec("echo kept > file; echo kept > /tmp/other", timeout=10)
    assert shared.exec("cat file /tmp/other", timeout=10).stdout == "kept\nkept\n"


def test_many_commands_at_the_same_time(substrate, options):
    async def run() -> float:
        async with Client(substrate=substrate, **options) as client:
            sandbox = await client.create()
            seen: dict[int, str] = {}

            async def one(number: int) -> None:
                result = await sandbox.exec(f"sleep 0.3; echo {number}", timeout=20)
                seen[number] = result.stdout

            started = time.monotonic()
            async with anyio.create_task_group() as group:
                for number in range(20):
                    group.start_soon(one, number)
            assert seen == {number: f"{number}\n" for number in range(20)}
            return time.monotonic() - started

    assert anyio.run(run) < 5


# Time ----------------------------------------------------------------------------------------


def test_a_timeout_ends_the_command_and_reports_it(sandbox: SyncSandbox):
    started = time.monotonic()
    result = sandbox.exec("echo before; sleep 30", timeout=0.4)
    assert time.monotonic() - started < 3
    assert result.timed_out
    assert result.exit_code == 137
    assert result.stdout == "before\n"


ESCAPES = {
    "child": "sleep 3333",
    "background": "sleep 3333 & wait",
    "own session": "setsid sleep 3333 & wait",
    "ignores signals": "trap '' TERM INT HUP; while :; do sleep 3333; done",
    "orphan": "(setsid sh -c 'trap \"\" TERM; sleep 3333' &) ; sleep 30",
    "stopped": "sleep 3333 & kill -STOP $!; wait",
    "keeps forking": "f() { sleep 3333 & f2() { :; }; }; while :; do f; sleep 0.01; done",
}


@pytest.mark.parametrize("command", ESCAPES.values(), ids=list(ESCAPES))
def test_no_process_survives_a_timeout(sandbox: SyncSandbox, command: str):
    assert sandbox.exec(command, timeout=0.3).timed_out
    left = sandbox.exec("pgrep -c sleep", timeout=10)
    assert left.stdout == "0\n"


def test_a_timeout_spares_other_commands_where_promised(client: SyncClient):
    sandbox = client.create(Container())
    sandbox.exec("sleep 4444 > /dev/null 2>&1 &", timeout=10)
    sandbox.exec("sleep 3333", timeout=0.3)
    alive = sandbox.exec("pgrep -c sleep", timeout=10).stdout
    assert alive == ("1\n" if sandbox.caps.timeout_kills == "command" else "0\n")


def test_background_processes_live_on_and_do_not_delay(sandbox: SyncSandbox):
    started = time.monotonic()
    result = sandbox.exec(
        "(while sleep 0.05; do echo tick; date >> beat; done) & echo started", timeout=10
    )
    assert time.monotonic() - started < 2
    assert result.stdout.startswith("started")
    # Its pipe is emptied by somebody, so it neither blocks nor dies from writing.
    sandbox.exec("rm -f beat; sleep 0.5", timeout=10)
    assert sandbox.exec("test -s beat", timeout=10).exit_code == 0


def test_orphans_are_reaped(sandbox: SyncSandbox):
    sandbox.exec("for i in $(seq 20); do (true &) ; done; sleep 0.1", timeout=10)
    assert sandbox.exec("ps -A -o stat= | grep -c Z", timeout=10).stdout == "0\n"


def test_a_caller_who_gives_up_ends_the_command(substrate, options):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:
            sandbox = await client.create()
            with anyio.move_on_after(0.3) as scope:
                await sandbox.exec("sleep 3333", timeout=60)
            assert scope.cancelled_caught
            for _ in range(100):
                result = await sandbox.exec("pgrep -c sleep", timeout=10)
                if result.stdout == "0\n":
                    return
            pytest.fail("the command still runs")

    anyio.run(run)


# Output --------------------------------------------------------------------------------------


def test_output_beyond_the_cap_is_dropped_and_said(shared: SyncSandbox):
    result = shared.exec("head -c 300000 /dev/zero | tr '\\0' x; echo e >&2", timeout=10, cap=1000)
    assert result.stdout == "x" * 1000
    assert result.stderr == "e\n"
    assert result.truncated
    assert result.exit_code == 0


def test_output_of_exactly_the_cap_is_whole(shared: SyncSandbox):
    result = shared.exec("printf 12345", timeout=10, cap=5)
    assert (result.stdout, result.truncated) == ("12345", False)


def test_endless_output_costs_little(sandbox: SyncSandbox):
    before = time.process_time()
    result = sandbox.exec("yes", timeout=1.5)
    assert result.timed_out
    assert result.truncated
    assert len(result.stdout) == 1 << 20
    assert time.process_time() - before < 1


def test_endless_output_from_the_background_does_not_slow_commands(sandbox: SyncSandbox):
    sandbox.exec("nice yes &", timeout=10)
    started = time.monotonic()
    for _ in range(5):
        assert sandbox.exec("true", timeout=10).exit_code == 0
    assert time.monotonic() - started < 3


def test_large_output_is_complete(shared: SyncSandbox):
    result = shared.exec("seq 400000", timeout=30, cap=16 << 20)
    assert result.stdout == "".join(f"{i}\n" for i in range(1, 400001))


# Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", None, True and -0.0])
def test_useless_timeouts(shared: SyncSandbox, timeout):
    with pytest.raises(SandboxError, match="timeout"):
        shared.exec("true", timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"command": "echo a\0b"}, "NUL"),
        ({"command": ["echo", "a\0b"]}, "NUL"),
        ({"command": "true", "cwd": "a\0b"}, "NUL"),
        ({"command": "true", "env": {"A": "b\0"}}, "NUL"),
        ({"command": "true", "env": {"A=B": "c"}}, "="),
        ({"command": "true", "env": {"": "c"}}, "empty"),
        ({"command": []}, "empty"),
        ({"command": ["echo", 5]}, "not text"),
        ({"command": "\ud800"}, "Unicode"),
        ({"command": "x" * 131072}, "files.write"),
        ({"command": "true", "cap": -1}, "cap"),
        ({"command": "cat", "stdin": "\ud800"}, "Unicode"),
        ({"command": "true", "cwd": "missing"}, "/work/missing"),
        ({"command": "true", "cwd": "/etc/passwd"}, "/etc/passwd"),
    ],
)
def test_unusable_arguments_say_what_is_wrong(shared: SyncSandbox, arguments, reason):
    with pytest.raises(SandboxError, match=reason):
        shared.exec(**arguments, timeout=10)
    assert shared.exec("true", timeout=10).exit_code == 0


def test_the_longest_command_runs(shared: SyncSandbox):
    command = "echo " + "x" * (131071 - 5)
    assert len(shared.exec(command, timeout=10).stdout) == 131071 - 5 + 1


def test_a_command_after_stop(sandbox: SyncSandbox):
    sandbox.stop()
    sandbox.stop()
    with pytest.raises(SandboxLost, match="stopped"):
        sandbox.exec("true", timeout=10)
    with pytest.raises(SandboxLost):
        sandbox.files.read("x")


def test_the_last_who_asks_for_a_key_follows_it(shared: SyncSandbox):
    """Nobody waits for an end that was told to somebody else."""
    command = "echo x >> ran; sleep 0.4; wc -l < ran"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(shared.exec, command, timeout=20, op="follow/1")
        while shared.receipt("follow/1").state != "running":
            time.sleep(0.01)
        second = pool.submit(shared.exec, command, timeout=20, op="follow/1")
        with pytest.raises(SandboxError, match="another line follows"):
            first.result()
        assert second.result().stdout == "1\n"

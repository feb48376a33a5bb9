"""Function calls: values, errors, limits, and that no call finds anything of an earlier one."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import (
    Client,
    Fn,
    Functions,
    Net,
    Sandbox,
    SyncClient,
    SyncFunctions,
    SyncSandbox,
    seccomp,
)
from fathom.sandbox.line import Line

# How calls are reached: each by a socket of its own, or through the interpreter.
WAYS = ["direct", "relay"]


@contextlib.contextmanager
def reached(way: str) -> Iterator[None]:
    """Have interpreters that are started meanwhile reached in one way."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "relay":
            patch.setattr(Line, "passes_files", False)
        yield


@pytest.fixture(scope="module", params=WAYS)
def functions(
    request: pytest.FixtureRequest, runtime_dir: Path, cache_dir: Path
) -> Iterator[SyncFunctions]:
    with (
        SyncClient(runtime_dir=runtime_dir, cache_dir=cache_dir) as client,
        reached(request.param),
        client.functions(Fn(workers=1, maximum=1)) as made,
    ):
        yield made


@pytest.fixture(params=WAYS)
def own(request: pytest.FixtureRequest, client: SyncClient) -> Iterator[SyncFunctions]:
    """For calls that may cost their container."""
    with reached(request.param), client.functions(Fn(workers=1, maximum=1)) as made:
        yield made


def test_values_come_back(functions: SyncFunctions):
    for value in (1, "\u00e9", [1, {"a": None}], 2.5, True, "x" * 300_000):
        result = functions.call("def main(x): return x", value, timeout=10)
        assert (result.value, result.error) == (value, "")
    named = functions.call(
        "def f(x):\n    print('said')\n    return x * 2", 4, timeout=10, function="f"
    )
    assert (named.value, named.output) == (8, "said\n")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def main(x): return 1 / 0", "ZeroDivisionError"),
        ("def main(x) return", "SyntaxError"),
        ("y = 1", "KeyError"),
        ("def main(x): return object()", "not JSON serializable"),
        ("def main(x): raise SystemExit(3)", "SystemExit"),
    ],
)
def test_errors_are_told(functions: SyncFunctions, code: str, said: str):
    result = functions.call(code, timeout=10)
    assert said in result.error
    assert result.value is None


def test_output_is_capped(functions: SyncFunctions):
    result = functions.call("def main(x): print('y' * 5000)", timeout=10, cap=100)
    assert (result.output, result.truncated) == ("y" * 100, True)


LEAVE = """
import os, sys, builtins, subprocess, json
def main(x):
    builtins.leaked = 1
    json.leaked = 1
    os.environ["LEAKED"] = "1"
    os.makedirs("/work/a/b"); open("/work/a/b/c", "w").write("1")
    open("/tmp/leaked", "w").write("1"); open("/dev/shm/leaked", "w").write("1")
    os.chmod("/work", 0o777)
    subprocess.Popen(["setsid", "sleep", "4444"])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import time; time.sleep(4445)
        os._exit(0)
    # A brother of this process, and a child that tells nobody of its end.
    import ctypes, platform, time
    clone = 56 if platform.machine() == "x86_64" else 220
    for flags in (0x8000 | 17, 0):
        if ctypes.CDLL(None).syscall(clone, flags, 0, 0, 0, 0) == 0:
            time.sleep(4446)
            os._exit(0)
"""
LOOK = """
import os, builtins, json
def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
def main(x):
    found = [name for module in (builtins, json) for name in vars(module) if name == "leaked"]
    found += [v for v in os.environ if v == "LEAKED"]
    for folder in ("/work", "/tmp", "/dev/shm"):
        found += os.listdir(folder)
    count = sum(alive(pid) for pid in os.listdir("/proc") if pid.isdigit())
    return found, count, oct(os.stat("/work").st_mode & 0o777)
"""


def test_nothing_of_a_call_reaches_the_next(functions: SyncFunctions):
    before = functions.call(LOOK, timeout=10).value
    assert functions.call(LEAVE, timeout=10).error == ""
    after = functions.call(LOOK, timeout=10).value
    assert before == after
    assert after[0] == []


SHARED = """
import ctypes
def main(x):
    c = ctypes.CDLL(None)
    return c.shmget(4711, 4096, 0o1666 if x else 0o666)
"""


def test_shared_memory_costs_the_container(own: SyncFunctions):
    assert own.call(SHARED, True, timeout=10).value >= 0
    for _ in range(3):
        try:
            assert own.call(SHARED, False, timeout=10).value == -1
            return
        except SandboxLost:
            continue
    pytest.fail("no interpreter came back")


ATTACK = """
import os
def main(x):
    parent = os.getppid()
    reached = []
    for name in ("mem", "environ", "maps", "fd/0", "exe"):
        try:
            fd = os.open(f"/proc/{parent}/{name}", os.O_RDWR if name == "mem" else os.O_RDONLY)
            reached.append(name)
        except OSError:
            pass
    return reached
"""


def test_a_call_cannot_change_the_interpreter(functions: SyncFunctions):
    assert functions.call(ATTACK, timeout=10).value == []


def test_a_killed_interpreter_is_replaced(own: SyncFunctions):
    kill = "import os\ndef main(x):\n    os.kill(os.getppid(), 9)\n    return 1"
    with_loss = 0
    for _ in range(2):
        try:
            own.call(kill, timeout=10)
        except SandboxLost:
            with_loss += 1
    for _ in range(3):
        try:
            assert own.call("def main(x): return x", 5, timeout=10).value == 5
            break
        except SandboxLost:
            continue
    else:
        pytest.fail("no interpreter came back")


def test_a_call_that_takes_too_long(own: SyncFunctions):
    started = time.monotonic()
    result = own.call("def main(x):\n    while True: pass", timeout=0.5)
    assert result.timed_out
    assert time.monotonic() - started < 5
    assert own.call("def main(x): return 1", timeout=10).value == 1


def test_arguments_that_are_no_json(functions: SyncFunctions):
    with pytest.raises(SandboxError, match="JSON"):
        functions.call("def main(x): return x", object(), timeout=5)
    with pytest.raises(SandboxError, match="timeout"):
        functions.call("def main(x): return x", timeout=0)


@pytest.mark.parametrize("spec", [Fn(workers=0), Fn(workers=3, maximum=2)])
def test_useless_pools(client: SyncClient, spec: Fn):
    with pytest.raises(SandboxError, match="workers"):
        client.functions(spec)


def test_the_pool_grows_while_calls_wait(options: dict[str, Path]):
    async def run() -> None:
        async with (
            Client(**options) as client,
            await client.functions(Fn(workers=1, maximum=3)) as functions,
        ):
            values: list[int] = []

            async def one(number: int) -> None:
                code = "import time\ndef main(x):\n    time.sleep(0.3)\n    return x"
                values.append((await functions.call(code, number, timeout=20)).value)

            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(one, number)
            assert sorted(values) == list(range(6))
            assert functions.size == functions.idle == 3
        with pytest.raises(SandboxLost, match="closed"):
            await functions.call("def main(x): return x", timeout=5)

    anyio.run(run)


def test_a_call_that_ends_without_an_answer(functions: SyncFunctions):
    result = functions.call("import os\ndef main(x):\n    os._exit(0)", timeout=10)
    assert "without an answer" in result.error
    assert functions.call("def main(x): return x", 1, timeout=10).value == 1


# Every file that a call can reach, open already or through /proc, gets what an interpreter would
# say: in frames of a size and JSON alone, and in those of today, whose first nonce is known.
FORGE = """
import json, os, struct
FRAMES = b""
for m in ({"value": "mine", "output": ""}, {"ready": True}, {"value": "forged"}, {"ready": True}):
    data = json.dumps(m).encode()
    FRAMES += struct.pack("<I", len(data)) + data
for kind, m in ((1, b'{"value": "forged"}'), (0, b""), (1, b'{"value": "forged"}'), (0, b"")):
    FRAMES += struct.pack("<16sBI", bytes(16), kind, len(m)) + m
def main(x):
    tried = 0
    for pid in [n for n in os.listdir("/proc") if n.isdigit()] if x else []:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                try:
                    fd = os.open(f"/proc/{pid}/fd/{name}", os.O_WRONLY | os.O_NONBLOCK)
                    tried += pid != str(os.getpid())
                    os.write(fd, FRAMES)
                except OSError:
                    continue
        except OSError:
            continue
    for fd in range(64):
        try:
            os.write(fd, FRAMES)
        except OSError:
            continue
    if tried:
        os.write(1, b"others")
    os._exit(0)
"""


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_call_cannot_answer_for_another(own: SyncFunctions, everywhere: bool):
    with contextlib.suppress(SandboxLost):
        assert "others" not in own.call(FORGE, everywhere, timeout=10).output
    for number in range(3):
        result = own.call("def main(x): return x", number, timeout=10)
        assert (result.error, result.value) == ("", number)


# Writes to every socket that the call's process has.
TWO_ANSWERS = """
import json, os, struct
def main(x):
    data = json.dumps({"value": x}).encode()
    for fd in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                os.write(fd, struct.pack("<I", len(data)) + data + x.encode())
        except OSError:
            continue
    os._exit(0)
"""
WHOLE = struct.pack("<I", 19) + b'{"value": "forged"}'


@pytest.mark.parametrize("more", ["x", "second answer", WHOLE.decode() * 3])
def test_data_after_an_answer_reaches_nobody(own: SyncFunctions, more: str):
    assert own.call(TWO_ANSWERS, more, timeout=10).value == more
    for number in range(3):
        again = own.call("def main(x): return x", number, timeout=10)
        assert (again.error, again.value) == ("", number)


# Keeps the call's socket in a process of its own session, and goes on to write answers there.
LATER = """
import json, os, struct, time
def main(x):
    data = json.dumps({"value": "forged"}).encode()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                for fd in range(3, 64):
                    try:
                        os.write(fd, struct.pack("<I", len(data)) + data)
                    except OSError:
                        continue
                time.sleep(0.0005)
        os._exit(0)
    return "mine"
"""


def test_a_process_that_is_left_answers_nobody(own: SyncFunctions):
    for _ in range(3):
        # The call's own answer may be forged by what it started: that is the same call.
        with contextlib.suppress(SandboxLost):
            assert own.call(LATER, timeout=10).value in ("mine", "forged")
        for number in range(3):
            again = own.call("def main(x): return x", number, timeout=10)
            assert (again.error, again.value) == ("", number)


LINGER = TWO_ANSWERS.replace("os._exit(0)", "import time; time.sleep(60)").replace(
    " + x.encode()", ""
)


def test_a_call_that_answers_and_stays_is_ended(own: SyncFunctions):
    for _ in range(2):
        assert own.call(LINGER, "said", timeout=10).value == "said"
        began = time.monotonic()
        assert own.call("def main(x): return x", 3, timeout=10).value == 3
        # Not by waiting for it and giving up: the interpreter is still the same one.
        assert time.monotonic() - began < 2


def test_a_call_that_closes_its_socket_has_no_answer(own: SyncFunctions):
    code = "import os, time\ndef main(x):\n    os.closerange(3, 64)\n    time.sleep(60)"
    assert "without an answer" in own.call(code, timeout=10).error
    assert own.call("def main(x): return x", 3, timeout=10).value == 3


SEND_FILES = """
import array, os, socket, struct
def main(x):
    files = array.array("i", [os.open("/dev/null", 0)] * 3).tobytes()
    for fd in range(3, 64):
        try:
            own = socket.socket(fileno=os.dup(fd))
            own.sendmsg([struct.pack("<I", 16)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            own.sendmsg([b'{"value": "one"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        except OSError:
            continue
    os._exit(0)
"""


def test_files_that_a_call_sends_are_dropped(own: SyncFunctions):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert own.call(SEND_FILES, timeout=10).value == "one"
        assert own.call("def main(x): return x", 3, timeout=10).value == 3
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("answer", ["[1]", "[" * 100_000, "{", '"x"', "1e999999"])
def test_an_answer_that_is_none(own: SyncFunctions, answer: str):
    code = TWO_ANSWERS.replace('json.dumps({"value": x}).encode()', "x.encode()")
    with pytest.raises(SandboxLost):
        own.call(code.replace(" + x.encode()", ""), answer, timeout=10)
    assert own.call("def main(x): return x", 5, timeout=10).value == 5


SEARCH = """
import ctypes, os
def main(x):
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    needle, found = (x[0] + x[1]).encode(), 0
    own = id(needle)
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if line.split()[1][0] != "r" or "[v" in line:
                continue
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except (OSError, OverflowError):
                continue
            at = data.find(needle)
            while at >= 0:
                found += not own <= start + at < own + 256
                at = data.find(needle, at + 1)
            del data
    return found
"""


def test_no_call_finds_the_words_of_the_one_before(functions: SyncFunctions):
    words = ("the password of ", "the caller before")
    told = functions.call("def main(x):\n    return x", "".join(words), timeout=10)
    assert told.value == "".join(words)
    assert functions.call(SEARCH, words, timeout=20).value == 0
    # It does find what is there.
    there = SEARCH.replace(
        "needle, found", "kept = [bytes(bytearray(x[0] + x[1], 'utf8'))]\n    needle, found"
    )
    assert functions.call(there, words, timeout=20).value > 0


CHANGE_PARENT = """
import ctypes, os, resource
def main(x):
    parent, refused = os.getppid(), []
    def attempt(name, work):
        try:
            work()
        except PermissionError:
            refused.append(name)
    for name, value in (("FSIZE", 7), ("NOFILE", 6), ("NPROC", 5), ("CPU", 1)):
        limit = getattr(resource, "RLIMIT_" + name)
        attempt(name, lambda: resource.prlimit(parent, limit, (value, value)))
    attempt("affinity", lambda: os.sched_setaffinity(parent, {min(os.sched_getaffinity(0))}))
    attempt("nice", lambda: os.setpriority(os.PRIO_PROCESS, parent, 19))
    attempt("nice of the user", lambda: os.setpriority(os.PRIO_USER, 0, 19))
    attempt("nice of the group", lambda: os.setpriority(os.PRIO_PGRP, 0, 19))
    attempt("scheduler", lambda: os.sched_setscheduler(parent, os.SCHED_IDLE, os.sched_param(0)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(x[0], 1, parent, 3 << 13) < 0 and ctypes.get_errno() == 1:
        refused.append("ioprio")
    if libc.syscall(x[1], b"left", 0o102, 0o600, None) < 0 and ctypes.get_errno() == 1:
        refused.append("queue")
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))  # one's own may be changed
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return refused
"""
LIMITS_NOW = """
import os, resource
def main(x):
    limits = [resource.getrlimit(number) for number in range(16)]
    return limits, os.getpriority(0, 0), len(os.sched_getaffinity(0)), os.sched_getscheduler(0)
"""


def test_a_call_cannot_change_limits_of_the_next(functions: SyncFunctions):
    numbers = [seccomp.SELF_ALONE["ioprio_set"][0], seccomp.NOT_FOR_CALLS["mq_open"]]
    column = 0 if platform.machine() == "x86_64" else 1
    before = functions.call(LIMITS_NOW, timeout=10).value
    refused = functions.call(CHANGE_PARENT, [pair[column] for pair in numbers], timeout=10)
    assert refused.error == ""
    assert refused.value == [
        *("FSIZE", "NOFILE", "NPROC", "CPU", "affinity", "nice", "nice of the user"),
        *("nice of the group", "scheduler", "ioprio", "queue"),
    ]
    assert functions.call(LIMITS_NOW, timeout=10).value == before


MARK_FOLDERS = """
import os
def main(x):
    marks = []
    for folder in ("/work", "/tmp", "/dev/shm"):
        for mark in (
            lambda: os.utime(folder, ns=(4242, 4242)),
            lambda: os.setxattr(folder, "user.mark", b"left"),
            lambda: os.chmod(folder, 0o1700),
        ):
            try:
                mark() if x else None
            except OSError:
                pass
        found = os.stat(folder)
        marks.append([found.st_mode, found.st_mtime_ns == 4242, os.listxattr(folder)])
    return marks
"""


def test_a_call_cannot_mark_the_folders(own: SyncFunctions):
    before = own.call(MARK_FOLDERS, False, timeout=10).value
    own.call(MARK_FOLDERS, True, timeout=10)
    assert own.call(MARK_FOLDERS, False, timeout=10).value == before


def test_what_cannot_be_removed_costs_nobody_else_a_call(own: SyncFunctions):
    deep = (
        "import os\ndef main(x):\n    os.chdir('/work')\n    for _ in range(1500):\n"
        "        os.mkdir('d')\n        os.chdir('d')"
    )
    assert own.call(deep, timeout=10).error == ""
    assert own.call("def main(x): return x", 3, timeout=10).value == 3


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_calls_is_there_for_each_machine(machine: str):
    program = seccomp.compile_call_filter(machine)
    assert len(program) % 8 == 0
    assert len(program) < 8 * 4096


def test_one_parameter_switches_to_functions(client: SyncClient):
    with client.create(Fn(workers=1, maximum=1)) as made:
        assert made.exec("echo $0 there", timeout=10).stdout == "/bin/sh there\n"
        # What stays in the background holds the output open, and takes nothing of it along.
        left = made.exec("echo said; echo wrong >&2; sleep 4326 & exit 3", timeout=10)
        assert (left.exit_code, left.stdout, left.stderr) == (3, "said\n", "wrong\n")
        long = made.exec("head -c 300000 /dev/zero | tr '\\0' x", timeout=10, cap=100_000)
        assert (len(long.stdout), long.truncated) == (100_000, True)
        assert made.caps.snapshot == made.caps.fork == ""
        with pytest.raises(Unsupported, match="layers"):
            made.pack_diff(name="x/y")
        with pytest.raises(Unsupported, match="receipts"):
            made.exec("true", timeout=10, op="once")
    for wrong in ({"net": Net.deny()}, {"key": "k"}, {"group": "g"}):
        with pytest.raises(Unsupported, match=next(iter(wrong))):
            client.create(Fn(), **wrong)


def test_a_pool_has_every_method_of_a_sandbox():
    for sandbox, pool in ((Sandbox, Functions), (SyncSandbox, SyncFunctions)):
        methods = {name for name in vars(sandbox) if inspect.isfunction(vars(sandbox)[name])}
        wanted = {name for name in methods if not name.startswith("_")}
        assert wanted - set(dir(pool)) <= {"resumed", "paused", "hand_line"}
        known = inspect.signature(sandbox.exec).parameters
        assert list(inspect.signature(pool.exec).parameters) == list(known)


def test_pools_end_with_their_client(options: dict[str, Path]):
    with SyncClient(**options) as client:
        made = client.create(Fn(workers=1, maximum=1))
        assert made.call("def main(x): return x", 1, timeout=10).value == 1
    assert made.closed

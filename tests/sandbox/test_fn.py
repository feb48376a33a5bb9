"""Function calls: values, errors, limits, and that no call finds anything of an earlier one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import Client, Fn, SyncClient, SyncFunctions


@pytest.fixture(scope="module")
def functions(runtime_dir: Path, cache_dir: Path) -> Iterator[SyncFunctions]:
    with (
        SyncClient(runtime_dir=runtime_dir, cache_dir=cache_dir) as client,
        client.functions(Fn(workers=1, maximum=1)) as made,
    ):
        yield made


@pytest.fixture
def own(client: SyncClient) -> Iterator[SyncFunctions]:
    """For calls that cost their container."""
    with client.functions(Fn(workers=1, maximum=1)) as made:
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

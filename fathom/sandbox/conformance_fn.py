"""What a pool of interpreters must do, as checks like those of `conformance` for sandboxes.

    report = await conformance_fn.run(lambda: client.functions(Fn(workers=1, maximum=1)))
    assert report.passed, report

With one worker every call meets what the one before could have left.

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox.conformance import METHODS, Failed, Outcome, Report
from fathom.sandbox.fn import Functions

Make = Callable[[], Awaitable[Functions]]
Check = Callable[[Functions], Awaitable[None]]
_TIMEOUT = 30.0
# The methods of a sandbox that need something to be kept.
MISSING = frozenset(METHODS) - {"exec", "stop", "caps"}


async def run(make: Make, only: str | None = None) -> Report:
    """Put a type of pool through every check (or the one named); `make` opens a fresh one."""
    outcomes: list[Outcome] = []
    for name, check in CHECKS.items():
        if only not in (None, name):
            continue
        began, problem = time.monotonic(), ""
        functions = await make()
        try:
            await check(functions)
        except (Failed, SandboxError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            await functions.stop()
        outcomes.append(Outcome(name=name, problem=problem, seconds=time.monotonic() - began))
    return Report(tuple(outcomes))


def _same(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r}, not {wanted!r}")


async def check_call(functions: Functions) -> None:
    """A call gives back what its function returns, what it printed, or how it failed."""
    result = await functions.call(
        "def main(x): print('hi'); return [x, 1]", {"a": "\u00fc"}, timeout=5
    )
    _same((result.value, result.output, result.error), ([{"a": "\u00fc"}, 1], "hi\n", ""), "a call")
    failed = await functions.call("def main(x): return 1 / x", 0, timeout=5)
    if "ZeroDivisionError" not in failed.error:
        raise Failed(f"an error was not told: {failed}")
    _same((await functions.call("def main(x): return x", 5, timeout=5)).value, 5, "the next call")


async def check_exec(functions: Functions) -> None:
    """A command's streams stay apart, its exit code comes back, and a failure is a result."""
    result = await functions.exec("echo out; echo err >&2; exit 7", timeout=_TIMEOUT)
    _same((result.exit_code, result.stdout, result.stderr), (7, "out\n", "err\n"), "exec")
    merged = await functions.exec("echo a; echo b >&2; echo c", timeout=_TIMEOUT, merge=True)
    _same(merged.output, "a\nb\nc\n", "merged output")
    listed = await functions.exec(["printf", "%s|", "a b", "$HOME", "*"], timeout=_TIMEOUT)
    _same(listed.stdout, "a b|$HOME|*|", "arguments")
    missing = await functions.exec(["no-such-program"], timeout=_TIMEOUT)
    _same(missing.exit_code, 127, "exit code of a missing program")
    killed = await functions.exec("kill -9 $$", timeout=_TIMEOUT)
    _same(killed.exit_code, 137, "exit code of a killed program")
    data = bytes(range(256)) * 4096
    counted = await functions.exec("wc -c", timeout=_TIMEOUT, stdin=data)
    _same(counted.stdout.strip(), str(len(data)), "bytes of standard input")
    capped = await functions.exec("yes | head -c 300000", timeout=_TIMEOUT, cap=1000)
    _same((len(capped.stdout), capped.truncated), (1000, True), "kept output")
    where = await functions.exec('pwd; echo "$A"', timeout=_TIMEOUT, cwd="/tmp", env={"A": "b c"})
    _same(where.stdout, "/tmp\nb c\n", "folder and variable")


async def check_state(functions: Functions) -> None:
    """Nothing of one call is there in the next: files, processes, variables, modules."""
    leave = """
import builtins, os, subprocess, sys
def main(x):
    builtins.left = 1
    sys.modules["left"] = os
    os.environ["LEFT"] = "1"
    for folder in ("/work", "/tmp", "/dev/shm"):
        open(folder + "/left", "w").write("x")
    subprocess.Popen(["sleep", "4327"], start_new_session=True)
"""
    await functions.call(leave, timeout=5)
    await functions.exec("echo x > /tmp/left2; (setsid sleep 4327 &)", timeout=5)
    look = """
import builtins, glob, os, sys
def main(x):
    running = [p for p in glob.glob("/proc/[0-9]*/cmdline") if b"4327" in open(p, "rb").read()]
    files = [f for d in ("/work", "/tmp", "/dev/shm") for f in os.listdir(d)]
    return [hasattr(builtins, "left"), "left" in sys.modules, "LEFT" in os.environ, running, files]
"""
    found = await functions.call(look, timeout=5)
    nothing: list[object] = [False, False, False, [], []]
    _same(found.value, nothing, "what a call left")


async def check_timeout(functions: Functions) -> None:
    """A call or command that takes too long is ended, and the next one is served."""
    result = await functions.call("def main(x):\n    while True: pass", timeout=0.5)
    _same(result.timed_out, True, "a call without an end")
    _same((await functions.exec("sleep 100", timeout=0.5)).timed_out, True, "a command without one")
    _same((await functions.call("def main(x): return x", 1, timeout=9)).value, 1, "the next call")


async def check_isolation(functions: Functions) -> None:
    """There is no network, no capability, and the system cannot be written to."""
    devices = await functions.exec("tail -n +3 /proc/net/dev | cut -d: -f1", timeout=_TIMEOUT)
    _same(devices.stdout.split(), ["lo"], "network devices")
    status = await functions.exec("cat /proc/self/status; id -u", timeout=_TIMEOUT)
    values = dict(line.split(":\t", 1) for line in status.stdout.splitlines() if ":\t" in line)
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        _same(int(values[kind], 16), 0, kind)
    _same((values["NoNewPrivs"], status.stdout.split()[-1]), ("1", "1000"), "the tenant")
    for path in ("/x", "/usr/bin/x", "/etc/x"):
        if (await functions.exec(["touch", path], timeout=_TIMEOUT)).exit_code == 0:
            raise Failed(f"{path} could be written")


async def check_surface(functions: Functions) -> None:
    """Every method of a sandbox is there; those that need something to be kept say so."""
    for name in sorted(MISSING):
        try:
            method = getattr(functions, name)
            await method("x")
        except Unsupported as error:
            if "keeps nothing" in str(error):
                continue
        raise Failed(f"{name} raised no Unsupported")
    caps = functions.caps
    _same((caps.fork, caps.snapshot, caps.pause, caps.pty), ("", "", False, False), "caps")
    if not caps.substrate:
        raise Failed("caps do not say what it is")


async def check_end(functions: Functions) -> None:
    """A stopped pool is gone."""
    await functions.stop()
    await functions.stop()
    try:
        await functions.call("def main(x): return x", timeout=5)
    except SandboxLost:
        try:
            await functions.exec("true", timeout=5)
        except SandboxLost:
            return
    raise Failed("a stopped pool answered")


CHECKS: dict[str, Check] = {
    "call": check_call,
    "exec": check_exec,
    "state": check_state,
    "timeout": check_timeout,
    "isolation": check_isolation,
    "surface": check_surface,
    "end": check_end,
}

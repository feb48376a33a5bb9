"""What every type of sandbox must do, as checks that any new one can be put through.

    report = await conformance.run(lambda: client.create(Container()))
    assert report.passed, report

A check gets a sandbox of its own where it changes much, else a shared one. What `caps` deny must
raise Unsupported: a method that is missing, or one that does less than it says, fails.

Paper: §5.2.5 (every type of sandbox has the same surface).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

import anyio

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox.files import SandboxFileIsFolder, SandboxFileMissing
from fathom.sandbox.line import Refused
from fathom.sandbox.net import Net
from fathom.sandbox.process import Process
from fathom.sandbox.sandbox import Sandbox

Make = Callable[[], Awaitable[Sandbox]]
Check = Callable[[Sandbox], Awaitable[None]]
_TIMEOUT = 60.0
CHECKS: dict[str, Check] = {}
# What every type of sandbox has, if only to say that it cannot.
METHODS = (
    *("exec", "run", "files", "pty", "fork", "snapshot", "pack_diff"),
    *("pause", "resume", "phase", "stop", "caps"),
)
# Checks that end their sandbox or leave it changed.
OWN: set[str] = set()


class Failed(AssertionError):
    """A sandbox does not do what every sandbox must."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check: `problem` is empty where it passed."""

    name: str
    problem: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one type of sandbox."""

    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(not outcome.problem for outcome in self.outcomes)

    def __str__(self) -> str:
        lines = [f"{outcome.name}: {outcome.problem or 'ok'}" for outcome in self.outcomes]
        return "\n".join(lines)


async def run(make: Make, only: str | None = None) -> Report:
    """Put a type of sandbox through every check (or the one named); `make` starts a fresh one.

    Checks in a sandbox of their own run beside those in the shared one: most of both is waiting.
    """
    names = [only] if only is not None else list(CHECKS)
    outcomes: dict[str, Outcome] = {}
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_run_shared, make, [n for n in names if n not in OWN], outcomes)
            group.start_soon(_run_own, make, [n for n in names if n in OWN], outcomes)
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return Report(tuple(outcomes[name] for name in names))


async def _run_shared(make: Make, names: list[str], outcomes: dict[str, Outcome]) -> None:
    shared: Sandbox | None = None
    try:
        for name in names:
            if shared is None or shared.stopped:
                shared = await make()
            outcomes[name] = await _run_one(name, shared)
    finally:
        if shared is not None:
            await shared.stop()


async def _run_own(make: Make, names: list[str], outcomes: dict[str, Outcome]) -> None:
    for name in names:
        sandbox = await make()
        try:
            outcomes[name] = await _run_one(name, sandbox)
        finally:
            await sandbox.stop()


async def _run_one(name: str, sandbox: Sandbox) -> Outcome:
    began = time.monotonic()
    problem = ""
    try:
        await CHECKS[name](sandbox)
    except (Failed, SandboxError) as error:
        problem = f"{type(error).__name__}: {error}"
    return Outcome(name=name, problem=problem, seconds=time.monotonic() - began)


def _check(function: Check) -> Check:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def _own(function: Check) -> Check:
    OWN.add(function.__name__.removeprefix("check_"))
    return _check(function)


def _same(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r}, not {wanted!r}")


async def _raises(kind: type[Exception], call: Awaitable[object], what: str) -> None:
    try:
        await call
    except kind:
        return
    raise Failed(f"{what} raised no {kind.__name__}")


async def _output(process: Process) -> dict[str, bytes]:
    found = {"stdout": b"", "stderr": b""}
    async for name, data in process:
        found[name] += data
    return found


# Commands --------------------------------------------------------------------------------------


@_check
async def check_exec(sandbox: Sandbox) -> None:
    """A command's streams stay apart, its exit code comes back, and a failure is a result."""
    result = await sandbox.exec("echo out; echo err >&2; exit 7", timeout=_TIMEOUT)
    _same((result.exit_code, result.stdout, result.stderr), (7, "out\n", "err\n"), "exec")
    merged = await sandbox.exec("echo a; echo b >&2; echo c", timeout=_TIMEOUT, merge=True)
    _same(merged.output, "a\nb\nc\n", "merged output")
    listed = await sandbox.exec(["printf", "%s|", "a b", "$HOME", "*"], timeout=_TIMEOUT)
    _same(listed.stdout, "a b|$HOME|*|", "arguments")
    missing = await sandbox.exec(["no-such-program"], timeout=_TIMEOUT)
    _same(missing.exit_code, 127, "exit code of a missing program")
    killed = await sandbox.exec("kill -9 $$", timeout=_TIMEOUT)
    _same(killed.exit_code, 137, "exit code of a killed program")


@_check
async def check_input(sandbox: Sandbox) -> None:
    """Standard input arrives whole, also where it is larger than every buffer on the way."""
    data = bytes(range(256)) * 8192
    result = await sandbox.exec("wc -c", timeout=_TIMEOUT, stdin=data)
    _same(result.stdout.strip(), str(len(data)), "bytes of standard input")
    empty = await sandbox.exec("cat", timeout=_TIMEOUT)
    _same(empty.stdout, "", "no standard input")
    unread = await sandbox.exec("true", timeout=_TIMEOUT, stdin=data)
    _same(unread.exit_code, 0, "standard input that nobody reads")


@_check
async def check_environment(sandbox: Sandbox) -> None:
    """Folder and variables are what was asked for, and every command is the same tenant."""
    result = await sandbox.exec('pwd; echo "$A"', timeout=_TIMEOUT, cwd="/tmp", env={"A": "b c"})
    _same(result.stdout, "/tmp\nb c\n", "folder and variable")
    who = await sandbox.exec("id -u; pwd", timeout=_TIMEOUT)
    _same(who.stdout, "1000\n/work\n", "user and folder")
    await _raises(
        SandboxError, sandbox.exec("true", timeout=_TIMEOUT, cwd="/none"), "a missing folder"
    )
    await _raises(SandboxError, sandbox.exec("true", timeout=0), "a timeout of nothing")


@_check
async def check_timeout(sandbox: Sandbox) -> None:
    """A timeout ends the command with all it started, however that detached itself."""
    command = "echo early; setsid sleep 4321 & (setsid sh -c 'sleep 4321' &); sleep 4321"
    began = time.monotonic()
    result = await sandbox.exec(command, timeout=0.5)
    if not result.timed_out or result.stdout != "early\n":
        raise Failed(f"no timeout was told: {result}")
    if time.monotonic() - began > 10:
        raise Failed("the timeout came far too late")
    left = await sandbox.exec(
        "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f | grep -q '^sleep 4321' && echo $f;"
        " done; true",
        timeout=_TIMEOUT,
    )
    _same(left.stdout, "", "processes that a timeout left")


@_check
async def check_output_cap(sandbox: Sandbox) -> None:
    """Output beyond the cap is dropped and said; the content store has all of it on request."""
    result = await sandbox.exec("yes | head -c 300000", timeout=_TIMEOUT, cap=1000, spill=1 << 20)
    _same((len(result.stdout), result.truncated), (1000, True), "kept output")
    _same([(s.stream, s.size) for s in result.spilled], [("stdout", 300000)], "stored output")
    endless = await sandbox.exec("yes", timeout=1, cap=1000)
    _same((endless.timed_out, len(endless.stdout)), (True, 1000), "endless output")


@_check
async def check_concurrency(sandbox: Sandbox) -> None:
    """Commands run at the same time and do not mix."""
    seen: dict[int, str] = {}

    async def one(number: int) -> None:
        result = await sandbox.exec(f"sleep 0.2; echo {number}", timeout=_TIMEOUT)
        seen[number] = result.stdout

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    _same(seen, {number: f"{number}\n" for number in range(8)}, "output of eight commands")


@_check
async def check_cancellation(sandbox: Sandbox) -> None:
    """A caller who gives up ends the command."""
    with anyio.move_on_after(0.5):
        await sandbox.exec("sleep 4322", timeout=_TIMEOUT)
    for _ in range(50):
        left = await sandbox.exec(
            "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 432[2]'",
            timeout=_TIMEOUT,
        )
        if left.stdout.strip() == "0":
            return
        await anyio.sleep(0.1)
    raise Failed("the command of a caller who gave up still runs")


@_check
async def check_streams(sandbox: Sandbox) -> None:
    """A running command takes input, gives output at once, takes signals, and is ended by close."""
    script = "while read line; do echo got $line; done; echo end >&2"
    async with await sandbox.run(script, timeout=_TIMEOUT) as process:
        await process.write("one\n")
        _same(await process.read(), ("stdout", b"got one\n"), "the first piece")
        await process.write("two\n")
        await process.close_input()
        _same(await _output(process), {"stdout": b"got two\n", "stderr": b"end\n"}, "what followed")
        _same((await process.wait()).exit_code, 0, "exit code")
    async with await sandbox.run(["sleep", "4323"], timeout=_TIMEOUT) as process:
        await anyio.sleep(0.2)
        await process.signal(15)
        _same((await process.wait()).exit_code, 143, "exit code after a signal")


@_check
async def check_terminal(sandbox: Sandbox) -> None:
    """A terminal is one: it echoes, has a size that changes, and turns ^C into a signal."""
    if not sandbox.caps.pty:
        await _raises(Unsupported, sandbox.pty(timeout=_TIMEOUT), "pty without the cap")
        return
    script = "trap 'echo caught; exit 5' INT; test -t 0 && test -t 1 && echo terminal; read x"
    async with await sandbox.pty(["sh", "-c", script], timeout=_TIMEOUT) as process:
        await process.resize(50, 132)
        seen = b""
        while b"terminal" not in seen:
            piece = await process.read()
            if piece is None:
                raise Failed(f"no terminal: {seen!r}")
            seen += piece[1]
        for _ in range(10):
            # A shell that is just about to wait for input may take note of a signal only with the
            # next one.
            await process.write(b"\x03")
            with anyio.move_on_after(3):
                seen += (await _output(process))["stdout"]
                break
        if b"caught" not in seen:
            raise Failed(f"^C was no signal: {seen!r}")
        _same((await process.wait()).exit_code, 5, "exit code")


@_check
async def check_operation_keys(sandbox: Sandbox) -> None:
    """A command under a key runs once; its result comes back, another request is refused."""
    _same((await sandbox.receipt("k/1")).state, "never", "a key that nobody used")
    command = "echo run >> /tmp/count; echo done; exit 3"
    first = await sandbox.exec(command, timeout=_TIMEOUT, op="k/1")
    again = await sandbox.exec(command, timeout=_TIMEOUT, op="k/1")
    _same((again.exit_code, again.stdout), (first.exit_code, first.stdout), "the second result")
    _same((first.replayed, again.replayed), (False, True), "what is said of both")
    count = await sandbox.exec("cat /tmp/count", timeout=_TIMEOUT)
    _same(count.stdout, "run\n", "how often it ran")
    await _raises(Refused, sandbox.exec("other", timeout=_TIMEOUT, op="k/1"), "another request")
    _same((await sandbox.receipt("k/1")).state, "finished", "the receipt")
    _same((await sandbox.acknowledge("k/1")).state, "acked", "the receipt once acknowledged")


@_check
async def check_background(sandbox: Sandbox) -> None:
    """What a command leaves in the background lives on and delays nobody."""
    began = time.monotonic()
    await sandbox.exec("(sleep 1; echo late > /tmp/late) & echo now", timeout=_TIMEOUT)
    if time.monotonic() - began > 0.9:
        raise Failed("a background process delayed its command")
    await anyio.sleep(1.2)
    late = await sandbox.exec("cat /tmp/late", timeout=_TIMEOUT)
    _same(late.stdout, "late\n", "what the background wrote")


# Files -----------------------------------------------------------------------------------------


@_check
async def check_files(sandbox: Sandbox) -> None:
    """Files come back as they were written; entries are listed, renamed and removed."""
    files = sandbox.files
    data = bytes(range(256)) * 2048
    await files.write("deep/er/file", data, mode=0o640)
    _same(await files.read("deep/er/file") == data, True, "content")
    _same(await files.read_piece("deep/er/file", offset=255, size=2), b"\xff\0", "a piece")
    info = await files.stat("/work/deep/er/file")
    _same((info.kind, info.mode, info.size), ("file", 0o640, len(data)), "description")
    await files.mkdir("deep/folder")
    _same([i.name for i in await files.list("deep")], ["er", "folder"], "a list")
    await files.rename("deep/er/file", "deep/moved")
    _same((await files.stat("deep/moved")).size, len(data), "what was renamed")
    await files.remove("deep")
    await _raises(SandboxFileMissing, files.read("deep/moved"), "a removed file")
    await _raises(SandboxFileMissing, files.list("deep"), "a removed folder")
    await _raises(SandboxFileIsFolder, files.read("/work"), "reading a folder")
    await _raises(SandboxError, files.read("/dev/zero"), "reading a device")
    await files.write("big", b"x" * 2000)
    await _raises(SandboxError, files.read("big", limit=1999), "a file above the limit")


# Isolation -------------------------------------------------------------------------------------


@_check
async def check_no_network(sandbox: Sandbox) -> None:
    """Without a policy there is no way out, and a policy that cannot hold is refused."""
    devices = await sandbox.exec("tail -n +3 /proc/net/dev | cut -d: -f1", timeout=_TIMEOUT)
    _same(devices.stdout.split(), ["lo"], "network devices")
    for target in ("1.1.1.1/53", "169.254.169.254/80"):
        out = await sandbox.exec(
            ["timeout", "1", "bash", "-c", f": < /dev/tcp/{target}"], timeout=_TIMEOUT
        )
        if out.exit_code == 0:
            raise Failed(f"{target} was reached")
    if "address" not in sandbox.caps.networks:
        policy = Net.deny().address("203.0.113.1", 80)
        await _raises(Unsupported, sandbox.phase("x", net=policy), "a policy without the cap")


@_check
async def check_no_privileges(sandbox: Sandbox) -> None:
    """The tenant has no capability, can gain none, and cannot write to the system."""
    status = await sandbox.exec("cat /proc/self/status", timeout=_TIMEOUT)
    values = dict(line.split(":\t", 1) for line in status.stdout.splitlines() if ":\t" in line)
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        _same(int(values[kind], 16), 0, kind)
    _same(values["NoNewPrivs"], "1", "no_new_privs")
    for path in ("/x", "/usr/bin/x", "/etc/x"):
        written = await sandbox.exec(["touch", path], timeout=_TIMEOUT)
        if written.exit_code == 0:
            raise Failed(f"{path} could be written")
    agent = await sandbox.exec("kill -9 1; exec 3<> /proc/1/mem", timeout=_TIMEOUT)
    if agent.exit_code == 0:
        raise Failed("the agent's memory could be opened")
    _same((await sandbox.exec("echo alive", timeout=_TIMEOUT)).stdout, "alive\n", "afterwards")


# The sandbox as a whole ------------------------------------------------------------------------


@_own
async def check_pause(sandbox: Sandbox) -> None:
    """A paused sandbox stands still, its pause counts for no timeout, a request lets it go on."""
    if not sandbox.caps.pause:
        await _raises(Unsupported, sandbox.pause(), "pause without the cap")
        await _raises(Unsupported, sandbox.resume(), "resume without the cap")
        return
    await sandbox.exec(
        "(while :; do cat /proc/uptime >> /tmp/beat; sleep 0.02; done) > /dev/null 2>&1 &",
        timeout=_TIMEOUT,
    )
    results: list[bool] = []

    async def patient() -> None:
        results.append((await sandbox.exec("sleep 1", timeout=2)).timed_out)

    async with anyio.create_task_group() as group:
        group.start_soon(patient)
        await anyio.sleep(0.3)
        await sandbox.pause()
        await anyio.sleep(2)
        await sandbox.resume()
    _same(results, [False], "a timeout during a pause")
    began = time.monotonic()
    before = await sandbox.exec("cat /proc/uptime", timeout=_TIMEOUT)
    await sandbox.pause()
    await sandbox.pause()
    await anyio.sleep(0.5)
    after = await sandbox.exec("cat /proc/uptime", timeout=_TIMEOUT)
    clock = float(after.stdout.split()[0]) - float(before.stdout.split()[0])
    if clock < time.monotonic() - began - 0.4:
        return  # a machine's own clock stands still with it: nothing in it can have gone on
    beats = await sandbox.exec("sleep 0.2; cat /tmp/beat", timeout=_TIMEOUT)
    times = [float(line.split()[0]) for line in beats.stdout.splitlines()]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if max(gaps, default=0) < 1.8:
        raise Failed(f"it went on while it was paused: the longest silence was {max(gaps)} s")


@_own
async def check_fork(sandbox: Sandbox) -> None:
    """A copy has the files, and from then on each has its own."""
    if not sandbox.caps.fork:
        await _raises(Unsupported, sandbox.fork(), "fork without the cap")
        return
    await sandbox.exec(
        "mkdir d; echo one > d/f; chmod 750 d; ln -s f d/l; echo tmp > /tmp/t", timeout=_TIMEOUT
    )
    copies = await sandbox.fork(2)
    try:
        _same(len(copies), 2, "copies")
        _same(len({sandbox.id, *(copy.id for copy in copies)}), 3, "names")
        for copy in copies:
            seen = await copy.exec("cat d/l /tmp/t; stat -c %a d; hostname", timeout=_TIMEOUT)
            _same(seen.stdout.split()[:3], ["one", "tmp", "750"], "files of a copy")
        await copies[0].exec("echo two > d/f", timeout=_TIMEOUT)
        for other in (sandbox, copies[1]):
            seen = await other.exec("cat d/f", timeout=_TIMEOUT)
            _same(seen.stdout, "one\n", "files of the others")
        names = {(await copy.exec("hostname", timeout=_TIMEOUT)).stdout for copy in copies}
        _same(len(names), 2, "hostnames of copies")
    finally:
        for copy in copies:
            await copy.stop()


@_own
async def check_snapshot(sandbox: Sandbox) -> None:
    """A snapshot is kept, or refused where there is none."""
    if not sandbox.caps.snapshot:
        await _raises(Unsupported, sandbox.snapshot(), "snapshot without the cap")
        return
    await sandbox.exec("echo kept > f", timeout=_TIMEOUT)
    kept = await sandbox.snapshot()
    if not kept.id:
        raise Failed("the snapshot has no name")
    _same((await sandbox.exec("cat f", timeout=_TIMEOUT)).stdout, "kept\n", "afterwards")


@_own
async def check_pack_diff(sandbox: Sandbox) -> None:
    """What was written becomes a layer with a digest, the same for the same writes."""
    if not sandbox.caps.snapshot:
        await _raises(Unsupported, sandbox.pack_diff(), "pack_diff without a snapshot")
        return
    await sandbox.exec("echo kept > f", timeout=_TIMEOUT)
    try:
        layer = await sandbox.pack_diff()
    except Unsupported:
        return  # it writes to a disk, and says so
    if not layer.startswith("sha256:"):
        raise Failed(f"pack_diff returned {layer!r}")
    _same(await sandbox.pack_diff(), layer, "the layer of the same writes")
    await sandbox.exec("echo more > g", timeout=_TIMEOUT)
    if await sandbox.pack_diff() == layer:
        raise Failed("other writes gave the same layer")


@_own
async def check_phases(sandbox: Sandbox) -> None:
    """Each phase has a policy of its own with the next version; none allows nothing."""
    first = await sandbox.phase("one")
    _same(await sandbox.phase("two"), first + 1, "the version of the second policy")
    _same(sandbox.phases, ["one", "two"], "phases")
    if "address" in sandbox.caps.networks:
        policy = Net.deny().address("203.0.113.1", 80)
        _same(await sandbox.phase("three", net=policy), first + 2, "the version of the third")
    out = await sandbox.exec(
        ["timeout", "1", "bash", "-c", ": < /dev/tcp/1.1.1.1/53"], timeout=_TIMEOUT
    )
    if out.exit_code == 0:
        raise Failed("what no policy allows was reached")


@_check
async def check_surface(sandbox: Sandbox) -> None:
    """Every method of the surface is there; what one cannot do raises Unsupported (see `caps`)."""
    for name in METHODS:
        if getattr(sandbox, name, None) is None:
            raise Failed(f"it has no {name}")
    if not sandbox.caps.screenshot:
        await _raises(Unsupported, sandbox.screenshot(), "a screenshot without the cap")
    if not sandbox.caps.substrate:
        raise Failed("caps do not say what it is")


@_own
async def check_end(sandbox: Sandbox) -> None:
    """A stopped sandbox is gone, for commands that run and for those that come."""
    lost: list[bool] = []

    async def waiting() -> None:
        try:
            await sandbox.exec("sleep 100", timeout=5)
        except SandboxLost:
            lost.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(waiting)
        await anyio.sleep(0.3)
        await sandbox.stop()
    _same(lost, [True], "a command that ran when its sandbox was stopped")
    await sandbox.stop()
    await _raises(SandboxLost, sandbox.exec("true", timeout=_TIMEOUT), "a command after stop")
    await _raises(SandboxLost, sandbox.files.read("x"), "a file after stop")

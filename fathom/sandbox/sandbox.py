"""One running sandbox: commands, files, terminals, pauses, copies.

A command that fails is a result; an exception means that the sandbox itself could not do its part.

Paper: §5.2.5 (the common surface of every type of sandbox).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from fathom.errors import DaemonLost, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import frames, ports
from fathom.sandbox.files import Files
from fathom.sandbox.frames import Flags, Frame, Tag
from fathom.sandbox.host import Host
from fathom.sandbox.line import Line, Refused, answer, refusal
from fathom.sandbox.net import Net
from fathom.sandbox.ports import Forward
from fathom.sandbox.process import (
    NAMES,
    NUMBER,
    Ended,
    Feeder,
    Kept,
    Order,
    Process,
    StreamName,
    read_end,
)
from fathom.sandbox.request import (
    Request,
    check_key,
    check_seconds,
    form_request,
    to_bytes,
)
from fathom.sandbox.threads import whole
from fathom.sandbox.types import DEFAULT_CAP, Caps, ExecResult, Snapshot, Spilled, Stats

# The agent ends its command on time; beyond this it is taken for lost.
_PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the agent knows of an operation key, and in which of its lives it says so."""

    state: str
    epoch: str
    digest: str


class Sandbox:
    """One running sandbox. Made by `Client.create`; commands may run at the same time."""

    def __init__(
        self,
        host: Host,
        name: str,
        caps: Caps,
        *,
        store: Path,
        adopt: Callable[[dict[str, Any]], Sandbox] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.id = name
        self.caps = caps
        self.files = Files(self._run_builtin)
        self.environment = dict(environment or {})
        self.phases: list[str] = []
        self._host = host
        self._store = store
        self._adopt = adopt
        self._stopped = False
        self._paused = False
        self._stood = 0.0  # seconds, when that was last asked

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    # Commands ----------------------------------------------------------------------------------

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        cap: int = DEFAULT_CAP,
        spill: int = 0,
        op: str | None = None,
    ) -> ExecResult:
        """Run `command` (text for the shell, a list for a program with arguments) to its end.

        `timeout` in seconds ends the command and everything it started (see `caps.timeout_kills`).
        `cwd`: folder, /work when not given. `stdin`: what it reads, nothing when not given. `env`:
        variables besides the fixed ones. `merge`: one stream in order of arrival. `cap`: bytes kept
        of each stream; with `spill`, so many go to the content store where there are more than
        that (the result says where it has no room). `op`: a key under which the command runs at
        most once: asked for again, its result comes back, until it is acknowledged; where no room
        is left for another receipt it does not run. Processes left in the background live on until
        the sandbox stops.
        Raises SandboxError for unusable arguments and SandboxLost after the sandbox ended.
        """
        request = form_request(command, timeout=timeout, cwd=cwd, env=env)
        if cap < 0 or spill < 0 or isinstance(spill, bool):
            raise SandboxError(f"cap is {cap}, spill is {spill}: give the number of bytes to keep")
        data = to_bytes(stdin)
        flags = (Flags.MERGE if merge else Flags(0)) | (
            Flags.STDIN if data is not None else Flags(0)
        )
        order = self._order(request, flags, max(cap, spill), op, data)
        kept: dict[StreamName, Kept] = {
            name: Kept(cap, spill, self._store / "output") for name in ("stdout", "stderr")
        }
        ooms = await self._host.oom_count(self.id)
        try:
            ended = await self._run(order, data, kept)
            spilled: list[tuple[StreamName, tuple[str, int] | None]] = [
                (name, stream.finish()) for name, stream in kept.items()
            ]
        finally:
            for stream in kept.values():
                stream.close()
        # What is killed now says nothing of a command that ran before.
        oom = ended.oom_killed or (
            not ended.replayed and await self._host.oom_count(self.id) > ooms
        )
        texts = [kept["stdout"].data.decode(errors="replace")]
        texts.append(kept["stderr"].data.decode(errors="replace"))
        return ExecResult(
            exit_code=ended.exit_code,
            stdout=texts[0],
            stderr=texts[1],
            output="".join(texts),
            timed_out=ended.timed_out,
            oom_killed=oom,
            truncated=ended.stdout_total > len(kept["stdout"].data)
            or ended.stderr_total > len(kept["stderr"].data),
            replayed=ended.replayed,
            lost=ended.lost,
            duration=ended.duration,
            cpu=ended.cpu,
            spilled=tuple(
                Spilled(stream=name, digest=stored[0], size=stored[1])
                for name, stored in spilled
                if stored is not None
            ),
            spill_problem=kept["stdout"].problem or kept["stderr"].problem,
        )

    async def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
    ) -> Process:
        """Start `command` and return it while it runs: output as it comes, input, signals.

        Arguments as for `exec`. Leaving its `async with`, or closing it, ends the command.
        Raises SandboxError for unusable arguments and SandboxLost after the sandbox ended.
        """
        request = form_request(command, timeout=timeout, cwd=cwd, env=env)
        flags = Flags.STDIN | (Flags.MERGE if merge else Flags(0))
        return await self._start(self._order(request, flags, 1 << 62, None, None))

    async def pty(
        self,
        command: str | Sequence[str] = ("/bin/sh", "-i"),
        *,
        timeout: float,
        rows: int = 24,
        columns: int = 80,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start `command` on a terminal of its own; see `run`.

        Raises SandboxError for unusable arguments and SandboxLost after the sandbox ended.
        """
        if not (0 < rows < 1 << 16 and 0 < columns < 1 << 16):
            raise SandboxError(f"a terminal of {rows} rows and {columns} columns: give 1 to 65535")
        variables = {"TERM": "xterm-256color", **(env or {})}
        request = form_request(command, timeout=timeout, cwd=cwd, env=variables)
        order = Order(
            request=request,
            cap=1 << 62,
            flags=Flags.PTY | Flags.STDIN,
            rows=rows,
            columns=columns,
            env=self.environment,
        )
        return await self._start(order)

    async def hand_line(
        self, command: str | Sequence[str], *, timeout: float, cwd: str | None = None
    ) -> Line | None:
        """Start `command` with a line as its standard input and output: bytes, and open files.

        Nothing stands in between; its errors and its end are not told. None where this client
        reaches the sandbox over something that carries no open files. Raises as `run`.
        """
        request = form_request(command, timeout=timeout, cwd=cwd)
        line = await self._line()
        try:
            if not line.passes_files:
                line.close()
                return None
            await line.send(self._order(request, Flags.LINE, 0, None, None).frame())
            await line.receive_started(NUMBER)
        except BaseException:
            line.close()
            raise
        return line

    def forward(self, port: int, *, timeout: float, listen: int = 0) -> Forward:
        """Lead a port of this machine to the sandbox's own `port`: `async with` gives the address.

        `timeout` in seconds ends each connection. `listen`: the port here, a free one for 0.
        Raises SandboxError for unusable arguments.
        """
        return Forward(self._line, ports.order(port, timeout), listen)

    def _order(
        self, request: Request, flags: Flags, cap: int, op: str | None, stdin: bytes | None
    ) -> Order:
        if op is not None:
            check_key(op)
            # Whoever asked may die: the command goes on, and its receipt waits for the next one.
            flags |= Flags.DETACH
        return Order(
            request=request,
            cap=cap,
            flags=flags,
            op=op,
            digest=request.digest(stdin, merge=bool(flags & Flags.MERGE)) if op is not None else "",
            env=self.environment,
        )

    async def _start(self, order: Order) -> Process:
        line = await self._line()
        try:
            await line.send(order.frame())
        except BaseException:
            line.close()
            raise
        return Process(line, self.id)

    async def _line(self) -> Line:
        """Open a line to the agent, ending a pause. Raises SandboxError, SandboxLost."""
        if self._stopped:
            raise SandboxLost(f"sandbox {self.id} was stopped: create another one")
        if not self._host.is_ours:
            raise SandboxError(
                f"sandbox {self.id} was made before a fork, by another process: create one here"
            )
        if self._paused:
            await self.resume()
        return await self._host.open(self.id)

    async def _run(
        self,
        order: Order,
        stdin: bytes | None,
        kept: Mapping[StreamName, Kept],
        enough: int | None = None,
    ) -> Ended:
        line: Line | None = None
        feeder = Feeder(stdin) if stdin is not None else None
        ask = order.frame() + (feeder.next() if feeder else b"")
        deadline, known = anyio.current_time() + order.request.timeout + _PATIENCE, self._stood
        try:
            while True:
                with anyio.CancelScope(deadline=deadline):
                    line = line or await self._line()
                    # What was not sent in time before is sent first.
                    now, ask = ask, b""
                    await line.send(now)
                    return await self._follow(line, order, feeder, kept, enough)
                # Whoever made it stand still, for a copy or a pause: no timeout counts that.
                stood = await self._stood_still()
                if stood <= known:
                    raise SandboxLost(
                        f"the agent of sandbox {self.id} did not answer in time: it may answer "
                        "again, or its guest has stopped it"
                    )
                deadline, known = deadline + stood - known, stood
        finally:
            # The agent sees it, so a caller who gave up ends the command.
            if line is not None:
                line.close()

    async def _follow(
        self,
        line: Line,
        order: Order,
        feeder: Feeder | None,
        kept: Mapping[StreamName, Kept],
        enough: int | None,
    ) -> Ended:
        while found := await line.receive():
            for frame in found:
                if frame.kind in NAMES:
                    kept[NAMES[frame.kind]].add(frame.payload)
                elif frame.kind == Frame.EXIT:
                    return self._end(read_end(frame), order)
                elif frame.kind == Frame.CREDIT and feeder is not None:
                    taken = frames.number_of(frame.fields().get(Tag.CAP))
                    if more := feeder.next(taken):
                        await line.send(more)
                elif frame.kind == Frame.ERROR:
                    raise _explain(refusal(frame))
            if enough is not None and len(kept["stdout"].data) >= enough:
                return _ENOUGH
        raise SandboxLost(f"sandbox {self.id} was lost while a command ran: create another one")

    async def _stood_still(self) -> float:
        """Return for how many seconds it has stood still since its node knows it.

        Raises SandboxLost, also where its node cannot tell: the command may be running. Raises
        DaemonLost where nobody answers.
        """
        try:
            with anyio.move_on_after(_PATIENCE):
                answer = await self._call("stats", id=self.id)
                self._stood = float(answer.get("stood", 0.0))
                return self._stood
        except SandboxError as error:
            raise SandboxLost(f"sandbox {self.id} does not answer: {error}") from error
        raise DaemonLost(f"nobody answers for sandbox {self.id}: it may still run")

    def _end(self, ended: Ended, order: Order) -> Ended:
        if ended.problem and not order.request.builtin:
            raise SandboxError(f"the command did not run: {ended.problem}")
        return ended

    async def _run_builtin(
        self, request: Request, stdin: bytes | None, cap: int, op: str | None
    ) -> tuple[Ended, bytes]:
        check_seconds(request.timeout)
        flags = Flags.STDIN if stdin is not None else Flags(0)
        kept: dict[StreamName, Kept] = {
            name: Kept(cap, 0, self._store) for name in ("stdout", "stderr")
        }
        order = self._order(request, flags, cap, op, stdin)
        enough = cap if request.builtin == "read" else None
        ended = await self._run(order, stdin, kept, enough)
        return ended, bytes(kept["stdout"].data)

    # Operation keys ----------------------------------------------------------------------------

    async def receipt(self, op: str) -> Receipt:
        """Ask what became of an operation: "never", "running", "finished", "acked" or "lost".

        Raises SandboxLost.
        """
        return await self._receipt(Frame.QUERY, op)

    async def acknowledge(self, op: str) -> Receipt:
        """Say that an operation's result is safe elsewhere: its output need not be kept.

        Raises SandboxLost.
        """
        return await self._receipt(Frame.ACK, op)

    async def _receipt(self, kind: Frame, op: str) -> Receipt:
        check_key(op)
        fields = (await self._ask_patiently(kind, frames.join_fields([(Tag.OP, op)]))).fields()
        return Receipt(
            frames.text_of(fields.get(Tag.STATE)),
            fields.get(Tag.EPOCH, b"").hex(),
            frames.text_of(fields.get(Tag.DIGEST)),
        )

    async def _ask_patiently(self, kind: Frame, payload: bytes) -> frames.Received:
        """Ask for what may be asked twice, for as long as the sandbox stands still and a while."""
        known = self._stood
        while True:
            with anyio.move_on_after(_PATIENCE):
                return await self._ask(kind, payload)
            stood = await self._stood_still()
            if stood <= known:
                raise SandboxLost(f"the agent of sandbox {self.id} did not answer in time")
            known = stood

    async def ping(self, *, timeout: float = 10.0) -> float:
        """Return how many seconds the agent took to answer. Raises SandboxLost, SandboxError."""
        check_seconds(timeout)
        began = anyio.current_time()
        with anyio.move_on_after(timeout):
            await self._ask(Frame.PING, b"")
            return anyio.current_time() - began
        raise SandboxLost(f"sandbox {self.id} did not answer within {timeout:g} s")

    async def _ask(self, kind: Frame, payload: bytes) -> frames.Received:
        line = await self._line()
        try:
            await line.send(frames.pack(NUMBER, kind, payload))
            return await answer(line, NUMBER)
        finally:
            line.close()

    # The sandbox as a whole --------------------------------------------------------------------

    async def pause(self, *, reclaim: bool = False) -> None:
        """Stop every process where it is; any later request lets them go on first.

        `reclaim`: give back what memory the kernel can. Raises Unsupported, SandboxLost.
        """
        self._need("pause", self.caps.pause)
        await self._call("freeze", ids=[self.id], reclaim=reclaim)
        self._paused = True

    async def resume(self) -> None:
        """Let the processes of a paused sandbox go on. Raises Unsupported, SandboxLost."""
        self._need("resume", self.caps.pause)
        await self._call("thaw", ids=[self.id])
        self.resumed()

    def resumed(self) -> None:
        """Take note that this sandbox goes on."""
        self._paused = False

    def paused(self) -> None:
        """Take note that somebody paused this sandbox."""
        self._paused = True

    async def stats(self) -> Stats:
        """Return what the sandbox uses now. Raises SandboxLost."""
        answer = await self._call("stats", id=self.id)
        return Stats(memory=answer.get("memory"), paused=self._paused)

    async def fork(self, count: int = 1, *, reseed: bool = True) -> list[Sandbox]:
        """Make `count` sandboxes that begin with this one's files, as of one moment.

        Each has its own secret, and with `reseed` its own hostname. Processes are not copied where
        `caps.fork` says "disk". Raises Unsupported, SandboxLost, SandboxError.
        """
        self._need("fork", bool(self.caps.fork) and self._adopt is not None)
        check_count(count, least=1)
        adopt = self._adopt
        assert adopt is not None

        async def make() -> list[Sandbox]:
            answer = await self._call("fork", id=self.id, count=count, reseed=reseed)
            return [adopt(one) for one in answer["made"]]

        return await whole(make, _stop_all)

    async def screenshot(self) -> bytes:
        """Return the graphical console as a picture, PNG. Raises Unsupported, SandboxLost."""
        self._need("screenshot", self.caps.screenshot)
        return base64.b64decode((await self._call("screenshot", id=self.id))["png"])

    async def snapshot(self) -> Snapshot:
        """Keep what the sandbox has written, as of this moment; `Client.restore` starts from it.

        Raises Unsupported, SandboxLost, SandboxError.
        """
        self._need("snapshot", bool(self.caps.snapshot))
        answer = await self._call("snapshot", id=self.id)
        return Snapshot(id=answer["snapshot"], size=answer["size"])

    async def pack_diff(self, *, name: str | None = None) -> str:
        """Make a layer of what the sandbox has written and return its digest.

        `name`: also keep an image of this sandbox's layers with that one on top, so that
        `Container(image=name)` goes on from here.
        Raises Unsupported, SandboxLost, SandboxError.
        """
        self._need("pack_diff", bool(self.caps.snapshot))
        return str((await self._call("pack", id=self.id, name=name))["layer"])

    async def phase(self, name: str, *, net: Net | None = None) -> int:
        """Begin a stage of the task under a network policy of its own; return its version.

        The policy replaces the former one as a whole; without `net` nothing is allowed.
        Raises Unsupported for what this sandbox's network cannot do, SandboxLost.
        """
        answer = await self._call("phase", id=self.id, phase=name, net=net)
        self.phases.append(name)
        self.environment = dict(answer.get("environment", {}))
        return int(answer["version"])

    async def network_log(self) -> list[dict[str, Any]]:
        """Return what was judged on this sandbox's network so far, in order. Raises SandboxLost."""
        text = str((await self._call("netlog", id=self.id))["text"])
        return [json.loads(line) for line in text.splitlines()]

    async def stop(self) -> None:
        """End every process and remove every trace. Does nothing the second time.

        Raises SandboxError, DaemonLost where that may not have happened: try again.
        """
        if self._stopped:
            return
        self._stopped = True
        try:
            with anyio.CancelScope(shield=True):
                await self._host.call("destroy", id=self.id)
        except BaseException:
            self._stopped = False  # it may still run: whoever asks again ends it
            raise

    async def _call(self, op: str, **values: Any) -> dict[str, Any]:
        if self._stopped:
            raise SandboxLost(f"sandbox {self.id} was stopped: create another one")
        return await self._host.call(op, **values)

    def _need(self, what: str, has: bool) -> None:
        if not has:
            raise Unsupported(f"a sandbox by {self.caps.substrate} has no {what}: see its caps")


def check_count(count: object, least: int) -> None:
    """Refuse what is no number of sandboxes. Raises SandboxError."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise SandboxError(f"count is {count!r:.80}: give a whole number from {least} up")


async def _stop_all(made: list[Sandbox]) -> None:
    for sandbox in made:
        await sandbox.stop()


_ENOUGH = Ended(
    exit_code=0,
    timed_out=False,
    cancelled=True,
    killed_all=False,
    oom_killed=False,
    replayed=False,
    duration=0.0,
    cpu=0.0,
    peak_memory=0,
    stdout_total=0,
    stderr_total=0,
)


def _explain(problem: Refused) -> SandboxError:
    if problem.reason == "no_process":
        return SandboxError(f"the command did not run: {problem}")
    return problem

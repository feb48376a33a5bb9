"""The same surface without `await`: every call is made on one private event loop thread.

    with SyncClient("local") as client:
        print(client.create(Container()).exec("echo hello", timeout=10).stdout)

Paper: §5.2.5.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from fathom.sandbox.client import Client, Group
from fathom.sandbox.files import DEFAULT_LIMIT, DEFAULT_TIMEOUT, FileInfo, Files
from fathom.sandbox.fn import OUTPUT_CAP, FnResult, Functions
from fathom.sandbox.net import Net
from fathom.sandbox.ports import Forward
from fathom.sandbox.process import Ended, Process, StreamName
from fathom.sandbox.sandbox import Receipt, Sandbox
from fathom.sandbox.stateless import SyncStateless
from fathom.sandbox.substrates.choice import Wanted
from fathom.sandbox.threads import Portal
from fathom.sandbox.types import (
    DEFAULT_CAP,
    Caps,
    ExecResult,
    Fn,
    Kept,
    Snapshot,
    Spec,
    Stats,
)


class SyncFiles:
    """The files of one sandbox; see `Files`."""

    def __init__(self, files: Files, portal: Portal) -> None:
        self._files = files
        self._portal = portal

    def read(
        self,
        path: str,
        *,
        offset: int = 0,
        limit: int = DEFAULT_LIMIT,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> bytes:
        """Return the content of a plain file; see `Files.read`."""
        return self._portal.call(
            self._files.read, path, offset=offset, limit=limit, timeout=timeout
        )

    def read_piece(
        self, path: str, *, offset: int, size: int, timeout: float = DEFAULT_TIMEOUT
    ) -> bytes:
        """Return at most `size` bytes; see `Files.read_piece`."""
        return self._portal.call(
            self._files.read_piece, path, offset=offset, size=size, timeout=timeout
        )

    def write(
        self,
        path: str,
        data: bytes | str,
        *,
        mode: int | None = None,
        op: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """Write a file; see `Files.write`."""
        self._portal.call(self._files.write, path, data, mode=mode, op=op, timeout=timeout)

    def stat(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> FileInfo:
        """Describe one entry; see `Files.stat`."""
        return self._portal.call(self._files.stat, path, timeout=timeout)

    def list(self, path: str = ".", *, timeout: float = DEFAULT_TIMEOUT) -> list[FileInfo]:
        """Describe the entries of a folder; see `Files.list`."""
        return self._portal.call(self._files.list, path, timeout=timeout)

    def mkdir(self, path: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Make a folder; see `Files.mkdir`."""
        self._portal.call(self._files.mkdir, path, op=op, timeout=timeout)

    def remove(self, path: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Remove an entry; see `Files.remove`."""
        self._portal.call(self._files.remove, path, op=op, timeout=timeout)

    def rename(
        self, path: str, target: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Give an entry another name; see `Files.rename`."""
        self._portal.call(self._files.rename, path, target, op=op, timeout=timeout)


class SyncProcess:
    """A command that runs; see `Process`. `with` ends it, `for` gives its output."""

    def __init__(self, process: Process, portal: Portal) -> None:
        self._process = process
        self._portal = portal

    @property
    def pid(self) -> int | None:
        """The command's number inside the sandbox, once its start was heard of."""
        return self._process.pid

    def __enter__(self) -> SyncProcess:
        """Return the process itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the command where it still runs."""
        self.close()

    def __iter__(self) -> Iterator[tuple[StreamName, bytes]]:
        """Give the output as it comes."""
        while (piece := self.read()) is not None:
            yield piece

    def read(self) -> tuple[StreamName, bytes] | None:
        """Return the next output; see `Process.read`."""
        return self._portal.call(self._process.read)

    def write(self, data: bytes | str) -> None:
        """Send standard input; see `Process.write`."""
        self._portal.call(self._process.write, data)

    def close_input(self) -> None:
        """Say that no more input comes; see `Process.close_input`."""
        self._portal.call(self._process.close_input)

    def signal(self, number: int = signals.SIGTERM) -> None:
        """Send a signal; see `Process.signal`."""
        self._portal.call(self._process.signal, number)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal; see `Process.resize`."""
        self._portal.call(self._process.resize, rows, columns)

    def wait(self) -> Ended:
        """Return how the command ended; see `Process.wait`."""
        return self._portal.call(self._process.wait)

    def close(self) -> None:
        """End the command where it still runs."""
        if self._portal.is_open:
            self._portal.call(self._process.close)


class SyncForward:
    """A port of this machine that leads into a sandbox; see `Forward`."""

    def __init__(self, forward: Forward, portal: Portal) -> None:
        self._inside = portal.manage(forward)

    def __enter__(self) -> tuple[str, int]:
        return self._inside.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside.__exit__(kind, error, trace)


class SyncSandbox:
    """One running sandbox; see `Sandbox`."""

    def __init__(self, sandbox: Sandbox, portal: Portal) -> None:
        self._sandbox = sandbox
        self._portal = portal
        self.files = SyncFiles(sandbox.files, portal)

    @property
    def id(self) -> str:
        """The sandbox's name on this machine."""
        return self._sandbox.id

    @property
    def caps(self) -> Caps:
        """What this sandbox really does."""
        return self._sandbox.caps

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._sandbox.stopped

    @property
    def environment(self) -> dict[str, str]:
        """Variables that every command finds besides the fixed ones."""
        return self._sandbox.environment

    @property
    def phases(self) -> list[str]:
        """The stages that were begun here, in order."""
        return self._sandbox.phases

    def __enter__(self) -> SyncSandbox:
        """Return the sandbox itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the sandbox."""
        self.stop()

    def exec(
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
        """Run `command` and wait for its end; see `Sandbox.exec`."""
        return self._portal.call(
            self._sandbox.exec,
            command,
            timeout=timeout,
            cwd=cwd,
            stdin=stdin,
            env=env,
            merge=merge,
            cap=cap,
            spill=spill,
            op=op,
        )

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
    ) -> SyncProcess:
        """Start `command` and return it while it runs; see `Sandbox.run`."""
        process = self._portal.call(
            self._sandbox.run, command, timeout=timeout, cwd=cwd, env=env, merge=merge
        )
        return SyncProcess(process, self._portal)

    def pty(
        self,
        command: str | Sequence[str] = ("/bin/sh", "-i"),
        *,
        timeout: float,
        rows: int = 24,
        columns: int = 80,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> SyncProcess:
        """Start `command` on a terminal of its own; see `Sandbox.pty`."""
        process = self._portal.call(
            self._sandbox.pty,
            command,
            timeout=timeout,
            rows=rows,
            columns=columns,
            cwd=cwd,
            env=env,
        )
        return SyncProcess(process, self._portal)

    def forward(self, port: int, *, timeout: float, listen: int = 0) -> SyncForward:
        """Lead a port of this machine to one of the sandbox; see `Sandbox.forward`."""
        made = self._sandbox.forward(port, timeout=timeout, listen=listen)
        return SyncForward(made, self._portal)

    def receipt(self, op: str) -> Receipt:
        """Ask what became of an operation; see `Sandbox.receipt`."""
        return self._portal.call(self._sandbox.receipt, op)

    def acknowledge(self, op: str) -> Receipt:
        """Say that a result is safe elsewhere; see `Sandbox.acknowledge`."""
        return self._portal.call(self._sandbox.acknowledge, op)

    def ping(self, *, timeout: float = 10.0) -> float:
        """Return how long the agent took to answer; see `Sandbox.ping`."""
        return self._portal.call(self._sandbox.ping, timeout=timeout)

    def pause(self, *, reclaim: bool = False) -> None:
        """Stop every process where it is; see `Sandbox.pause`."""
        self._portal.call(self._sandbox.pause, reclaim=reclaim)

    def resume(self) -> None:
        """Let the processes go on; see `Sandbox.resume`."""
        self._portal.call(self._sandbox.resume)

    def stats(self) -> Stats:
        """Return what the sandbox uses now; see `Sandbox.stats`."""
        return self._portal.call(self._sandbox.stats)

    def fork(self, count: int = 1, *, reseed: bool = True) -> list[SyncSandbox]:
        """Make copies; see `Sandbox.fork`."""
        made = self._portal.call(self._sandbox.fork, count, reseed=reseed)
        return [SyncSandbox(sandbox, self._portal) for sandbox in made]

    def screenshot(self) -> bytes:
        """Return the graphical console as PNG; see `Sandbox.screenshot`."""
        return self._portal.call(self._sandbox.screenshot)

    def snapshot(self) -> Snapshot:
        """Keep what the sandbox has written; see `Sandbox.snapshot`."""
        return self._portal.call(self._sandbox.snapshot)

    def pack_diff(self, *, name: str | None = None) -> str:
        """Make a layer of what the sandbox has written; see `Sandbox.pack_diff`."""
        return self._portal.call(self._sandbox.pack_diff, name=name)

    def phase(self, name: str, *, net: Net | None = None) -> int:
        """Begin a stage under a network policy of its own; see `Sandbox.phase`."""
        return self._portal.call(self._sandbox.phase, name, net=net)

    def network_log(self) -> list[dict[str, Any]]:
        """Return what was judged on this sandbox's network; see `Sandbox.network_log`."""
        return self._portal.call(self._sandbox.network_log)

    def stop(self) -> None:
        """End every process and remove every trace. Does nothing the second time."""
        if not self._sandbox.stopped:
            self._portal.call(self._sandbox.stop)


class SyncFunctions(SyncStateless):
    """A pool of interpreters; see `Functions`."""

    def __init__(self, functions: Functions, portal: Portal) -> None:
        self._functions = functions
        self._portal = portal

    def __enter__(self) -> SyncFunctions:
        """Return the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every interpreter."""
        self.close()

    @property
    def idle(self) -> int:
        """How many interpreters wait for a call."""
        return self._functions.idle

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._functions.closed

    @property
    def size(self) -> int:
        """How many interpreters there are."""
        return self._functions.size

    def open(self) -> None:
        """Start the interpreters; see `Functions.open`."""
        self._portal.call(self._functions.open)

    def call(
        self,
        code: str,
        argument: Any = None,
        *,
        timeout: float,
        function: str = "main",
        cap: int = OUTPUT_CAP,
    ) -> FnResult:
        """Run `code` and call its `function`; see `Functions.call`."""
        return self._portal.call(
            self._functions.call, code, argument, timeout=timeout, function=function, cap=cap
        )

    def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        cap: int = OUTPUT_CAP,
        spill: int = 0,
        op: str | None = None,
    ) -> ExecResult:
        """Run a command from its start to its end; see `Functions.exec`."""
        return self._portal.call(
            self._functions.exec,
            command,
            timeout=timeout,
            cwd=cwd,
            stdin=stdin,
            env=env,
            merge=merge,
            cap=cap,
            spill=spill,
            op=op,
        )

    @property
    def caps(self) -> Caps:
        """What each interpreter's sandbox really does; see `Functions.caps`."""
        return self._functions.caps

    def stop(self) -> None:
        """End every interpreter, as `close`."""
        self.close()

    def close(self) -> None:
        """End every interpreter. Does nothing the second time."""
        if self._portal.is_open:
            self._portal.call(self._functions.close)


class SyncGroup:
    """The sandboxes of a client that were made under one name; see `Group`."""

    def __init__(self, group: Group, portal: Portal) -> None:
        self._group = group
        self._portal = portal
        self.name = group.name

    def members(self) -> list[SyncSandbox]:
        """Return those that were not stopped."""
        return [SyncSandbox(sandbox, self._portal) for sandbox in self._group.members()]

    def pause(self, *, reclaim: bool = False) -> None:
        """Pause all of them; see `Group.pause`."""
        self._portal.call(self._group.pause, reclaim=reclaim)

    def resume(self) -> None:
        """Let all of them go on; see `Group.resume`."""
        self._portal.call(self._group.resume)

    def stop(self) -> None:
        """Stop all of them."""
        self._portal.call(self._group.stop)


class SyncClient:
    """Makes sandboxes on this machine; see `Client`. `with` stops those that are still running."""

    def __init__(
        self,
        where: str = "local",
        *,
        substrate: Wanted = "auto",
        cache_dir: str | Path | None = None,
        runtime_dir: str | Path | None = None,
        mirrors: Mapping[str, str] | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._client = Client(
            where,
            substrate=substrate,
            cache_dir=cache_dir,
            runtime_dir=runtime_dir,
            mirrors=mirrors,
            token=token,
            ca=ca,
            fingerprint=fingerprint,
        )
        self._portal = Portal()

    def __enter__(self) -> SyncClient:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop every sandbox of this client."""
        self.close()

    @overload
    def create(
        self,
        spec: Kept | None = None,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> SyncSandbox: ...

    @overload
    def create(
        self,
        spec: Fn,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> SyncFunctions: ...

    def create(
        self,
        spec: Spec | None = None,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> SyncSandbox | SyncFunctions:
        """Start a sandbox, or a pool of interpreters; see `Client.create`."""

        async def create() -> Sandbox | Functions:
            return await self._client.create(spec, net=net, key=key, group=group)

        made = self._portal.call(create)
        if isinstance(made, Functions):
            return SyncFunctions(made, self._portal)
        return SyncSandbox(made, self._portal)

    def prewarm(self, spec: Kept, count: int) -> None:
        """Have sandboxes of this kind wait; see `Client.prewarm`."""
        self._portal.call(self._client.prewarm, spec, count)

    def restore(
        self, snapshot: Snapshot | str, spec: Kept | None = None, *, group: str | None = None
    ) -> SyncSandbox:
        """Start a sandbox with the files of a snapshot; see `Client.restore`."""
        made = self._portal.call(self._client.restore, snapshot, spec, group=group)
        return SyncSandbox(made, self._portal)

    def attach(self, name: str) -> SyncSandbox:
        """Return a sandbox of the daemon by its name; see `Client.attach`."""
        return SyncSandbox(self._portal.call(self._client.attach, name), self._portal)

    def list(self) -> list[dict[str, Any]]:
        """Return what a daemon knows of its sandboxes; see `Client.list`."""
        return self._portal.call(self._client.list)

    def end(self, name: str) -> None:
        """End a sandbox of the daemon by its name; see `Client.end`."""
        self._portal.call(self._client.end, name)

    def left_alone(self) -> dict[str, str]:
        """Return what the daemon could not take over; see `Client.left_alone`."""
        return self._portal.call(self._client.left_alone)

    def functions(self, spec: Fn | None = None) -> SyncFunctions:
        """Start a pool of interpreters; see `Client.functions`."""
        return SyncFunctions(self._portal.call(self._client.functions, spec), self._portal)

    def output(self, digest: str) -> bytes:
        """Return what `exec` put into the content store; see `Client.output`."""
        return self._client.output(digest)

    def group(self, name: str) -> SyncGroup:
        """Return the group `name`, which needs no members yet."""
        return SyncGroup(self._client.group(name), self._portal)

    def close(self) -> None:
        """Stop every sandbox of this client. Does nothing the second time."""
        if self._portal.is_open:
            self._portal.call(self._client.close)
            self._portal.close()

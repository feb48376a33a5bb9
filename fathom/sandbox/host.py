"""Where sandboxes live: what a client needs of a node, near or far.

`Host` is what every kind of node offers; `LocalHost` is the node that a program starts for itself,
whose sandboxes end with the program. Requests and answers are plain values, so that a daemon can
take the same ones over a socket.

Paper: §5.2.5 (one surface; what differs between sandbox types is a parameter).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import agent, full, line, paths, state
from fathom.sandbox.egress import LOG
from fathom.sandbox.images import Image, Store, rootfs
from fathom.sandbox.known import Known
from fathom.sandbox.net import Net
from fathom.sandbox.nodelink import NodeLink
from fathom.sandbox.ready import Ready
from fathom.sandbox.substrates import container
from fathom.sandbox.substrates.caps import caps_of
from fathom.sandbox.substrates.choice import MACHINES, Name, Wanted, choose
from fathom.sandbox.threads import in_thread
from fathom.sandbox.types import Caps, Container, FullVM, Kept, MicroVM
from fathom.sandbox.writes import Writes

if TYPE_CHECKING:
    from fathom.sandbox.vm.host import Machines


class Host(Protocol):
    """A node that makes sandboxes and leads to them."""

    @property
    def is_ours(self) -> bool:
        """Whether this process may use it: a fork of the one that opened it may not."""
        ...

    async def call(self, op: str, **values: Any) -> dict[str, Any]:
        """Have one operation done. Raises SandboxError, also where nobody answers."""
        ...

    async def open(self, name: str) -> line.Line:
        """Open a line to the agent of the sandbox `name`, past its HELLO. Raises SandboxLost."""
        ...

    async def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        ...

    async def close(self) -> None:
        """Let go of the node. Does nothing the second time."""
        ...

    def close_at_exit(self) -> None:
        """Let go of the node where no event loop runs any more."""
        ...


class LocalHost:
    """Sandboxes of this program. `substrate` and the folders are those of `Client`."""

    def __init__(
        self,
        substrate: Wanted,
        cache: Path,
        runtime: Path,
        mirrors: Mapping[str, str] | None = None,
    ) -> None:
        self.wanted: Wanted = substrate
        self.cache = cache
        self.runtime = runtime
        self.mirrors = dict(mirrors or {})
        self.outlive = False
        self.link = NodeLink(runtime)
        self._machines: Machines | None = None
        self._writes = Writes(self.link, cache)
        self._known: dict[str, Known] = {}
        self.ready = Ready(self._create, self._lives, self._destroy)
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "create": self._claim,
            "prewarm": self._prewarm,
            "restore": self._restore,
            "fork": self._fork,
            "destroy": self._destroy,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "stats": self._stats,
            "snapshot": self._snapshot,
            "pack": self._pack,
            "phase": self._phase,
            "netlog": self._netlog,
            "screenshot": self._screenshot,
        }

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it, rather than being a fork of the one that did."""
        return self.link.is_ours

    async def call(self, op: str, **values: Any) -> dict[str, Any]:
        """Have one operation done. Raises SandboxError."""
        return await in_thread(self.do, op, **values)

    def do(self, op: str, **values: Any) -> dict[str, Any]:
        """Have one operation done in this thread. Raises SandboxError."""
        if op not in self._operations:
            raise Unsupported(f"this kind of sandbox has no {op}: see its caps")
        with full.telling(f"{op} a sandbox"):
            return self._operations[op](**values)

    async def open(self, name: str) -> line.Line:
        """Open a line to an agent. Raises SandboxLost."""
        return await self.link.open(name)

    async def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        return self.link.oom_count(name)

    async def close(self) -> None:
        """End the node and with it every sandbox. Does nothing the second time."""
        await in_thread(self.link.close)

    def close_at_exit(self) -> None:
        """End the node and with it every sandbox, without an event loop."""
        self.link.close()

    # Making ------------------------------------------------------------------------------------

    def _claim(self, spec: Kept) -> dict[str, Any]:
        """Hand out a sandbox that waits, where there is one, else start one."""
        return self.ready.take(spec) or self._create(spec)

    def _prewarm(self, spec: Kept, count: int) -> dict[str, Any]:
        """Have `count` sandboxes of this kind wait from now on."""
        self.ready.hold(spec, count)
        return {}

    def _lives(self, id: str) -> bool:
        return state.lives(self.runtime / id)

    @property
    def machines(self) -> Machines:
        """The virtual machines of this host; what serves them is loaded with the first one."""
        if self._machines is None:
            from fathom.sandbox.vm.host import Machines

            self._machines = Machines(self.link, self.cache, self.runtime)
        self._machines.outlive = self.outlive
        return self._machines

    def _is_machine(self, id: str) -> bool:
        return self._machines is not None and id in self._machines.known

    def _create(self, spec: Kept) -> dict[str, Any]:
        """Start a sandbox by the first substrate that can."""
        if isinstance(spec, MicroVM | FullVM):
            return self.machines.create(spec)
        spec.check()
        offers: list[tuple[Name, str, Caps]] = [
            (name, program, caps_of(name, spec)) for name, program in choose(self.wanted)
        ]
        image = self._image(spec.image)
        problems: list[SandboxError] = []
        for name, program, caps in offers:
            known = Known(spec, name, program, image, 0, caps)
            try:
                return self._start(known)
            except SandboxError as error:
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        kind = type(problems[0])
        raise kind("; ".join(str(problem) for problem in problems)) from problems[0]

    def _start(self, known: Known, hostname: str | None = None, **source: str) -> dict[str, Any]:
        spec = known.spec
        paths.make_runtime_folder(self.runtime)
        folder = self.runtime / f"sb-{os.getpid()}-{secrets.token_hex(5)}"
        layered = known.image if isinstance(known.image, Image) else None
        if layered is not None and known.name == "bubblewrap":
            raise Unsupported(f"the image {spec.image!r} has layers, which only root can mount")
        # A copy has its origin's range of users: the files in it belong to them.
        ids = known.ids or container.first_id(folder.name)
        launch = {
            "substrate": known.name,
            "program": known.program,
            "agent": str(agent.binary(self.cache)),
            "rootfs": "" if layered is not None else str(known.image),
            "store": str(self.cache / "store") if layered is not None else "",
            "layers": layered.layers if layered is not None else (),
            "image": layered.encode().decode() if layered is not None else "",
            "workdir": self._folder(spec.workdir),
            "memory": spec.memory_bytes,
            "pids": spec.pids_limit,
            "cpu": spec.cpu,
            "disk": spec.disk_bytes,
            "io_read": spec.io_bytes("read"),
            "io_write": spec.io_bytes("write"),
            "hostname": hostname or spec.hostname,
            "ids": ids,
            "outlive": self.outlive,
            "door": self._folder(spec.door),
        }
        try:
            folder.mkdir(mode=0o711)
            self.link.create(folder, launch, **source)
        except BaseException:
            if not state.reap_one(folder):
                state.remove(folder)
            raise
        self._known[folder.name] = Known(
            spec, known.name, known.program, known.image, ids, known.caps
        )
        variables = dict(layered.run.env) if layered is not None else {}
        return {"id": folder.name, "caps": known.caps, "environment": variables}

    def _folder(self, workdir: str | Path | None) -> str | None:
        # A daemon has resolved and judged it: another look could find another folder by now.
        if workdir is None or self.outlive:
            return None if workdir is None else str(workdir)
        return str(Path(workdir).resolve())

    def _image(self, name: str) -> Path | Image:
        """Return a built-in image's folder, or a layered image of the store."""
        if name in ("base", "python"):
            return rootfs.build(name, self.cache)
        with Store(self.cache / "store") as store:
            return store.resolve(name)

    def _phase(self, id: str, phase: str, net: Net | None) -> dict[str, Any]:
        """Set a whole policy; nothing is allowed by one that is not given."""
        machine = self._is_machine(id)
        known = self.machines.find(id) if machine else self._find(id)
        policy = net or Net.deny()
        if missing := sorted(policy.kinds - known.caps.networks):
            raise Unsupported(
                f"a sandbox by {known.caps.substrate} cannot have a network by "
                f"{' and '.join(missing)}: see its caps"
            )
        values = policy.as_json(self.mirrors)
        known.phases += 1
        image = known.image if isinstance(known, Known) else None
        variables = dict(image.run.env) if isinstance(image, Image) else {}
        if known.caps.networks == frozenset({"none"}):
            return {"version": known.phases, "environment": variables}
        answer = self.link.request("net", id=id, policy=values)
        # A guest reaches this machine's end of its network under the emulator's address.
        variables |= policy.environment("10.0.2.2" if machine else "127.0.0.1")
        return {"version": answer["version"], "environment": variables}

    def _netlog(self, id: str) -> dict[str, Any]:
        if not self._is_machine(id):
            self._find(id)
        path = self.runtime / id / LOG
        return {"text": path.read_text() if path.exists() else ""}

    def has(self, name: str) -> bool:
        """Whether a sandbox of this name is known here."""
        return self.link.has(name)

    def adopt(self, folder: Path, known: Known) -> None:
        """Take over a sandbox that outlived its node. Raises SandboxError."""
        self.link.adopt(folder)
        self._known[folder.name] = known

    def adopt_machine(
        self, folder: Path, spec: MicroVM | FullVM, caps: Caps, launch: dict[str, Any]
    ) -> None:
        """Take over a virtual machine that outlived its node. Raises SandboxError."""
        from fathom.sandbox.vm.launch import launch_in

        self.machines.adopt(folder, spec, caps, launch_in(folder, launch))

    def _find(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None:
            raise SandboxLost(f"sandbox {name} was stopped: create another one")
        return known

    def _fork(self, id: str, count: int, reseed: bool) -> dict[str, Any]:
        if self._is_machine(id):
            return self.machines.fork(id, count, reseed)
        known = self._find(id)

        def copy(number: int) -> dict[str, Any]:
            name = f"{known.spec.hostname[:50]}-{number}" if reseed else None
            return self._start(known, name, fork=id)

        if count == 1:
            return {"made": [copy(1)]}  # it stands still for the copy alone
        # All copies show one moment, so it stands still until the last of them is made.
        holder = secrets.token_hex(8)
        self.link.request("freeze", ids=[id], holder=holder)
        copies: list[Future[dict[str, Any]]] = []
        problems: list[BaseException] = []
        try:
            with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
                for number in range(count):
                    copies.append(pool.submit(copy, number + 1))
        except RuntimeError as error:  # no thread can be started
            problems.append(SandboxError(f"the copies cannot be made at once: {error}"))
        try:
            self.link.request("thaw", ids=[id], holder=holder)
        except SandboxError as error:  # it ended meanwhile, say; its copies would be nobody's
            problems.append(error)
        problems += [error for one in copies if (error := one.exception()) is not None]
        made = [one.result() for one in copies if one.exception() is None]
        if problems:
            for one in made:
                self._destroy(one["id"])
            raise problems[0]
        return {"made": made}

    # What was written --------------------------------------------------------------------------

    def _snapshot(self, id: str) -> dict[str, Any]:
        if self._is_machine(id):
            return self.machines.snapshot(id)
        return self._writes.keep(id, self._find(id))

    def _restore(self, snapshot: str, spec: Kept) -> dict[str, Any]:
        spec.check()
        folder, facts = self._writes.find(snapshot)
        if facts["substrate"] in MACHINES:
            return self.machines.restore(folder, facts, spec)
        if not isinstance(spec, Container):
            raise SandboxError(f"snapshot {snapshot} is of a Container: ask for one")
        if facts["image"] != spec.image:
            raise SandboxError(
                f"snapshot {snapshot} was made on image {facts['image']!r}: ask for that one"
            )
        # A copy has its origin's range of users, whatever else may serve it.
        name, program = choose(self.wanted)[0]
        description = facts.get("description")
        image = Image.decode(description.encode()) if description else self._image(spec.image)
        known = Known(spec, name, program, image, int(facts["ids"]), caps_of(name, spec))
        return self._start(known, saved=str(folder / "upper"))

    def _pack(self, id: str, name: str | None = None) -> dict[str, Any]:
        if self._is_machine(id):
            return self.machines.pack(id, name)
        return self._writes.pack(id, self._find(id), name)

    # Living ------------------------------------------------------------------------------------

    def _destroy(self, id: str) -> dict[str, Any]:
        if self._is_machine(id):
            self.machines.destroy(id)
            return {}
        self._known.pop(id, None)
        self.link.destroy(id)
        return {}

    def _screenshot(self, id: str) -> dict[str, Any]:
        return self.machines.screenshot(id)

    def _freeze(self, ids: list[str], reclaim: bool = False) -> dict[str, Any]:
        return self.link.request("freeze", ids=ids, reclaim=reclaim)

    def _thaw(self, ids: list[str]) -> dict[str, Any]:
        return self.link.request("thaw", ids=ids)

    def _stats(self, id: str) -> dict[str, Any]:
        return self.link.request("stats", id=id)

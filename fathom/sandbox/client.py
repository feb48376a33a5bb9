"""Makes sandboxes: `Client` for programs with an event loop, and groups of sandboxes.

    async with Client("local") as client:
        sandbox = await client.create(Container())
        result = await sandbox.exec("echo hello", timeout=10)

Paper: §5.2.5 (sandbox types with one surface; one node).
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import anyio

from fathom.errors import KeyConflict, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import fn, paths
from fathom.sandbox.edge.https_client import HttpsHost
from fathom.sandbox.edge.unix_client import UnixHost
from fathom.sandbox.fn import Functions
from fathom.sandbox.host import Host, LocalHost
from fathom.sandbox.net import Net
from fathom.sandbox.sandbox import Sandbox, check_count
from fathom.sandbox.substrates.choice import SUBSTRATES, Wanted
from fathom.sandbox.threads import whole
from fathom.sandbox.types import Container, Fn, Kept, Snapshot, Spec

_AT_ONCE = 1000
_hosts: weakref.WeakSet[LocalHost] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for host in list(_hosts):
        host.close_at_exit()


class Group:
    """The sandboxes of a client that were made under one name."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    def members(self) -> list[Sandbox]:
        """Return those that were not stopped."""
        return self._client.members(self.name)

    async def pause(self, *, reclaim: bool = False) -> None:
        """Pause all of them; see `Sandbox.pause`. Raises Unsupported, SandboxLost."""
        await self._client.pause_all(self.members(), reclaim)

    async def resume(self) -> None:
        """Let all of them go on. Raises Unsupported, SandboxLost."""
        await self._client.resume_all(self.members())

    async def stop(self) -> None:
        """Stop all of them."""
        async with anyio.create_task_group() as group:
            for sandbox in self.members():
                group.start_soon(sandbox.stop)


class Client:
    """Makes sandboxes on this machine. `async with` stops those that are still running.

    `where`: "local" for sandboxes of this program, which end with it, "edge" for those of this
    machine's daemon, which do not, or "https://HOST:PORT" for those of a daemon elsewhere, with its
    `token`; `ca`: a file of certificates to trust for it, or `fingerprint`: that of the only one.
    `substrate`: "auto", or one of "crun" and "runc" for root and
    "bubblewrap" for other users.
    `cache_dir`: where images are kept; `runtime_dir`: where live sandboxes have their folders.
    `mirrors`: name -> address of the package mirrors that policies may name.
    """

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
        far = where.startswith("https://")
        if where not in ("local", "edge") and not far:
            raise Unsupported(f'say "local", "edge" or "https://HOST:PORT", not {where!r}')
        if not far and (token, ca, fingerprint) != (None, None, None):
            raise SandboxError("token, ca and fingerprint are for a daemon at https://HOST:PORT")
        if substrate not in ("auto", *SUBSTRATES):
            raise SandboxError(f"substrate is {substrate!r}: choose auto, {', '.join(SUBSTRATES)}")
        cache = Path(cache_dir) if cache_dir is not None else paths.cache_folder()
        self._host: Host
        if far:
            self._host = HttpsHost(where, token or "", ca, fingerprint)
        elif where == "edge":
            folder = Path(runtime_dir) if runtime_dir is not None else paths.edge_folder()
            self._host = UnixHost(folder)
        else:
            folder = Path(runtime_dir) if runtime_dir is not None else paths.runtime_folder()
            local = LocalHost(substrate, cache, folder, mirrors)
            _hosts.add(local)
            self._host = local
        self._remote = where != "local"
        self._cache = cache
        self._sandboxes: dict[str, Sandbox] = {}
        self._groups: dict[str, str] = {}
        self._keys: dict[str, tuple[tuple[Spec, Net | None, str | None], str]] = {}
        self._pools: list[Functions] = []
        self._making = anyio.Lock()
        self._closed = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop every sandbox of this client. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            try:
                # Nobody else could find the interpreters of a pool, with a daemon either.
                for pool in self._pools:
                    await pool.close()
                if not self._remote:
                    async with anyio.create_task_group() as group:
                        for sandbox in list(self._sandboxes.values()):
                            group.start_soon(sandbox.stop)
            finally:
                await self._host.close()

    @overload
    async def create(
        self,
        spec: Kept | None = None,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> Sandbox: ...

    @overload
    async def create(
        self,
        spec: Fn,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> Functions: ...

    async def create(
        self,
        spec: Spec | None = None,
        *,
        net: Net | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> Sandbox | Functions:
        """Start a sandbox and return once it answers; for `Fn` a pool of interpreters.

        The pool has the methods of a sandbox: `exec` and `caps` work, those that need something to
        be kept between two calls raise Unsupported, as `net`, `key` and `group` do here.
        `net`: what it may reach, nothing when not given. `key`: asked for again under the same key,
        the sandbox that was made comes back; KeyConflict says that it was made from other values.
        `group`: a name under which sandboxes are paused and stopped together.
        Raises SandboxError for unusable values, Unsupported for limits that cannot hold here or
        when nothing on this machine can run a sandbox.
        """
        wanted = Container() if spec is None else spec
        if isinstance(wanted, Fn):
            for name, value in (("net", net), ("key", key), ("group", group)):
                if value is not None:
                    raise Unsupported(f"a pool of interpreters has no {name}: use Container")
            return await self.functions(wanted)
        _check_kind(wanted)
        _check_texts(key=key, group=group)
        _check_net(net)
        if self._remote:
            values = {"spec": wanted, "net": net, "key": key or "", "group": group or ""}
            return await self._make("create", group, **values)
        if key is None:
            return await self._connected(wanted, net, group)
        async with self._making:
            values = (wanted, net, group)
            if found := self._keyed(key, values):
                return found
            made = await self._connected(wanted, net, group)
            self._keys[key] = (values, made.id)
            return made

    async def _container(self, spec: Container) -> Sandbox:
        return await self.create(spec)

    async def _connected(self, spec: Spec, net: Net | None, group: str | None) -> Sandbox:
        made = await self._make("create", group, spec=spec)
        if net is not None:
            try:
                await made.phase("begin", net=net)
            except BaseException:
                await made.stop()
                raise
        return made

    def _keyed(self, key: str, values: tuple[Spec, Net | None, str | None]) -> Sandbox | None:
        known = self._keys.get(key)
        sandbox = self._sandboxes.get(known[1]) if known is not None else None
        if known is None or sandbox is None or sandbox.stopped:
            return None
        if known[0] != values:
            raise KeyConflict(
                f"the key {key!r} belongs to sandbox {sandbox.id}, made with other values, in "
                "another group or under another policy: use another key, or stop that one first"
            )
        return sandbox

    async def prewarm(self, spec: Kept, count: int) -> None:
        """Have `count` sandboxes of this kind wait: `create` then hands one out at once.

        Each one taken is replaced in the background. Raises SandboxError, Unsupported.
        """
        _check_kind(spec)
        check_count(count, least=0)
        await self._host.call("prewarm", spec=spec, count=count)

    async def restore(
        self, snapshot: Snapshot | str, spec: Kept | None = None, *, group: str | None = None
    ) -> Sandbox:
        """Start a sandbox from a snapshot; `spec` must be of the same type and image.

        A virtual machine goes on with its processes where `caps.snapshot` said "memory".

        Raises SandboxError, Unsupported.
        """
        name = snapshot.id if isinstance(snapshot, Snapshot) else snapshot
        _check_kind(spec or Container())
        _check_texts(snapshot=name, group=group)
        values: dict[str, Any] = {"snapshot": name, "spec": spec or Container()}
        if self._remote:
            values["group"] = group or ""
        return await self._make("restore", group, **values)

    async def _make(self, op: str, among: str | None, **values: Any) -> Sandbox:
        if self._closed:
            raise SandboxLost("this client was closed: make another one")

        async def make() -> Sandbox:
            return self._adopt(await self._host.call(op, **values))

        async def undo(made: Sandbox) -> None:
            # One that was made under a daemon's key is found again by that.
            if not values.get("key"):
                await made.stop()

        made = await whole(make, undo)
        if among is not None:
            self._groups[made.id] = among
        return made

    def _adopt(self, made: dict[str, Any]) -> Sandbox:
        for name in [name for name, old in self._sandboxes.items() if old.stopped]:
            del self._sandboxes[name]
            self._groups.pop(name, None)
        sandbox = Sandbox(
            self._host,
            made["id"],
            made["caps"],
            store=self._cache,
            adopt=self._adopt,
            environment=made.get("environment"),
        )
        self._sandboxes[sandbox.id] = sandbox
        return sandbox

    async def attach(self, name: str) -> Sandbox:
        """Return a sandbox of the daemon by its name, whoever made it.

        Raises SandboxLost where there is none, Unsupported without a daemon.
        """
        if not self._remote:
            raise Unsupported('only a daemon keeps sandboxes of others: use Client("edge")')
        found = await self._host.call("attach", id=name)
        sandbox = self._adopt(found)
        if found["group"]:
            self._groups[sandbox.id] = found["group"]
        if found["paused"]:
            sandbox.paused()
        return sandbox

    async def list(self) -> list[dict[str, Any]]:
        """Return what a daemon knows of its sandboxes. Raises Unsupported, DaemonLost."""
        if not self._remote:
            raise Unsupported('only a daemon keeps sandboxes of others: use Client("edge")')
        return list((await self._host.call("list"))["sandboxes"])

    async def end(self, name: str) -> None:
        """End a sandbox of the daemon by its name, also one that it could not take over.

        Raises SandboxLost where there is none, Unsupported without a daemon, SandboxError where
        something of it is left.
        """
        if not self._remote:
            raise Unsupported('only a daemon keeps sandboxes of others: use Client("edge")')
        _check_texts(name=name)
        if not (await self._host.call("destroy", id=name)).get("ended"):
            raise SandboxLost(f"sandbox {name[:80]} ended: there is nothing to stop")

    async def left_alone(self) -> dict[str, str]:
        """Return the sandboxes that live and that the daemon could not take over: name -> why.

        They are in no `list`; `end` ends them. Raises Unsupported, DaemonLost.
        """
        if not self._remote:
            raise Unsupported('only a daemon keeps sandboxes of others: use Client("edge")')
        return dict((await self._host.call("list")).get("left", {}))

    async def functions(self, spec: Fn | None = None) -> Functions:
        """Start a pool of interpreters for stateless calls. Raises SandboxError, Unsupported."""
        wanted = spec or Fn()
        fn.check(wanted)
        pool = Functions(wanted, self._container)
        await pool.open()
        self._pools = [one for one in self._pools if not one.closed]
        self._pools.append(pool)
        return pool

    def output(self, digest: str) -> bytes:
        """Return what `exec` put into the content store. Raises SandboxError."""
        path = self._cache / "output" / digest
        if len(digest) != 64 or not digest.isalnum() or not path.is_file():
            raise SandboxError(f"there is no output {digest[:80]!r} in {path.parent}")
        return path.read_bytes()

    def group(self, name: str) -> Group:
        """Return the group `name`, which needs no members yet."""
        return Group(self, name)

    def members(self, group: str) -> list[Sandbox]:
        """Return the sandboxes of a group that were not stopped."""
        return [
            sandbox
            for name, sandbox in self._sandboxes.items()
            if self._groups.get(name) == group and not sandbox.stopped
        ]

    async def pause_all(self, sandboxes: list[Sandbox], reclaim: bool = False) -> None:
        """Pause sandboxes of this client together. Raises Unsupported, SandboxLost."""
        for sandbox in sandboxes:
            if not sandbox.caps.pause:
                raise Unsupported(f"a sandbox by {sandbox.caps.substrate} has no pause")
        for some in _portions(sandboxes):
            await self._host.call("freeze", ids=[one.id for one in some], reclaim=reclaim)
            for sandbox in some:
                sandbox.paused()

    async def resume_all(self, sandboxes: list[Sandbox]) -> None:
        """Let sandboxes of this client go on together. Raises SandboxLost."""
        for some in _portions(sandboxes):
            await self._host.call("thaw", ids=[one.id for one in some])
            for sandbox in some:
                sandbox.resumed()


def _check_kind(spec: object) -> None:
    if not isinstance(spec, Kept):
        raise SandboxError(f"{spec!r:.80} is no sandbox: give a Container, a MicroVM or a FullVM")


def _check_net(net: object) -> None:
    if not isinstance(net, Net | None):
        raise SandboxError(f"net is {net!r:.80}: give a policy such as Net.deny()")


def _check_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str | None):
            raise SandboxError(f"{name} is {value!r:.80}: give text")


def _portions(sandboxes: list[Sandbox]) -> list[list[Sandbox]]:
    """Split what a daemon would not take in one request."""
    return [sandboxes[at : at + _AT_ONCE] for at in range(0, len(sandboxes), _AT_ONCE)]

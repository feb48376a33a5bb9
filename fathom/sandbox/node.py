"""The node: the one process with privileges, which makes sandboxes and ends them.

It works for one owner (a program with a client, or the daemon), does nothing but a few operations
on request, and keeps every mount in a namespace of its own. When its owner stops, crashes or is
killed, it ends every sandbox and removes every group and folder. Were the node itself killed, its
sandboxes die with it; what then remains (empty groups, a folder) is found by its unlocked lock file
and removed by the next node. Sandboxes made to outlive it are left alone and can be adopted.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import FathomError, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import box as boxes
from fathom.sandbox import cgroups, egress, full, messages, netns, state, syscalls
from fathom.sandbox.substrates.choice import MACHINES

if TYPE_CHECKING:
    from fathom.sandbox.vm.machine import Machine
    from fathom.sandbox.vm.saved import Saved, Shelf

_THREADS = 32
# After something was asked or ended orphans are looked for every so many milliseconds, for seconds.
_REAP_EVERY = 250
_RESTLESS = 2.0
_WNOTHREAD = 0x20000000


class Node:
    """All sandboxes of one owner."""

    def __init__(self, owner: socket.socket, owner_pid: int) -> None:
        self.owner = owner
        self.owner_fd = os.pidfd_open(owner_pid)
        self.boxes: dict[str, Any] = {}
        self._shelf: Shelf | None = None
        self.nets = netns.Pool(2) if os.geteuid() == 0 else None
        self.egress = egress.Egress()
        self.stopping = False
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(_THREADS)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._watched: dict[int, str] = {}
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "create": self._create,
            "destroy": self._destroy,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "save": self._save,
            "stats": self._stats,
            "net": self._net,
            "capture": self._capture,
            "release": self._release,
            "keep": self._keep,
            "screenshot": self._screenshot,
            "adopt": self._adopt,
        }

    # Serving -----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Carry out requests until the owner is gone."""
        poller = select.poll()
        for fd in (self.owner.fileno(), self.owner_fd, self._wake_read):
            poller.register(fd, select.POLLIN)
        restless = 0.0
        while True:
            found = poller.poll(_REAP_EVERY if time.monotonic() < restless else None)
            if found:
                restless = time.monotonic() + _RESTLESS
            _reap_orphans()
            for fd, _ in found:
                if fd == self._wake_read:
                    os.read(fd, 4096)
                    self._watch(poller)
                elif fd == self.owner.fileno():
                    if not self._take():
                        return
                elif fd == self.owner_fd:
                    return
                elif name := self._watched.pop(fd, None):
                    poller.unregister(fd)
                    self._died(name)

    def _take(self) -> bool:
        """Have one request carried out; False where the owner is gone."""
        try:
            message, fds = messages.receive(self.owner)
        except messages.BadMessage:  # whoever asked sees that nobody answers
            return True
        except OSError:
            return False
        if message is None:
            return False
        for fd in fds[1:]:
            os.close(fd)
        if fds:
            reply = socket.socket(fileno=fds[0])
            self._slots.acquire()
            self._begin(self._answer, message, reply)
        return True

    def _begin(self, work: Callable[..., None], *values: Any) -> None:
        try:
            threading.Thread(target=work, args=values).start()
        except RuntimeError:  # the machine has no thread left: that shall end no sandbox
            work(*values)

    def _watch(self, poller: select.poll) -> None:
        with self._lock:
            fresh = [b for b in self.boxes.values() if b.pidfd >= 0]
        for box in fresh:
            if box.pidfd not in self._watched:
                self._watched[box.pidfd] = box.id
                poller.register(box.pidfd, select.POLLIN)
        known = {box.pidfd for box in fresh}
        for fd in [fd for fd in self._watched if fd not in known]:
            del self._watched[fd]
            with contextlib.suppress(KeyError):
                poller.unregister(fd)

    def _died(self, name: str) -> None:
        with self._lock:
            box = self.boxes.pop(name, None)
        if box is not None:
            self._begin(self._end, box)

    def _answer(self, message: dict[str, Any], reply: socket.socket) -> None:
        try:
            try:
                answer = self._operations[message["op"]](message)
            except FathomError as error:
                answer = {"error": error.code, "message": str(error)[:4000]}
            except OSError as error:
                told = full.explain(error, f"{message.get('op')} a sandbox")
                answer = {"error": told.code, "message": str(told)[:4000]}
            except subprocess.SubprocessError as error:
                text = f"{error}; run `fathom doctor` to see what this machine can do"
                answer = {"error": SandboxError.code, "message": text[:4000]}
            except Exception as error:
                # A defect, or a request that fits nothing: neither may cost any sandbox.
                text = f"the node could not do what it was asked: {error!r}"
                answer = {"error": SandboxError.code, "message": text[:4000]}
            self._reply(reply, answer)
        finally:
            reply.close()
            self._slots.release()
            self._wake()

    def _reply(self, reply: socket.socket, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            try:
                messages.send(reply, answer)
            except SandboxError as error:
                messages.send(reply, {"error": error.code, "message": str(error)})

    def _box(self, name: str) -> boxes.Box | Machine:
        with self._lock:
            box = self.boxes.get(name)
        if box is None or box.ended:
            raise SandboxLost(f"sandbox {name} ended: create another one")
        return box

    # Operations --------------------------------------------------------------------------------

    def _create(self, message: dict[str, Any]) -> dict[str, Any]:
        folder = Path(message["folder"])
        if message["launch"]["substrate"] in MACHINES:
            return self._enter(self._create_machine(folder, message))
        launch = boxes.launch_in(folder, message["launch"])
        copied = self._container(message["fork"]) if message.get("fork") else None
        saved = Path(message["saved"]) if message.get("saved") else None
        box = boxes.make(launch, self.nets, copied, saved)
        return self._enter(box)

    def _create_machine(self, folder: Path, message: dict[str, Any]) -> Machine:
        from fathom.sandbox.vm import launch as plans
        from fathom.sandbox.vm import machine, saved

        launch = plans.launch_in(folder, message["launch"])
        source: Saved | None = None
        if message.get("captured"):
            source = self._saved().get(message["captured"])
        elif launch.template:
            where = Path(launch.template)
            source = self._saved().template(where) if launch.keep else saved.read(where)
        try:
            return machine.make(launch, self.nets, source)
        finally:
            if source is not None:
                source.close()

    def _saved(self) -> Shelf:
        from fathom.sandbox.vm import saved

        with self._lock:
            self._shelf = self._shelf or saved.Shelf()
            return self._shelf

    def _enter(self, box: boxes.Box | Machine, *, adopted: bool = False) -> dict[str, Any]:
        with self._lock:
            stopping = self.stopping
            if not stopping:
                self.boxes[box.id] = box
        if stopping:
            # One that was adopted is let go of as this process ends, for the next node.
            if not adopted:
                _kind(box).destroy(box)
            raise SandboxLost("the node is stopping")
        self._wake()
        return box.facts()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then it is awake already
            os.write(self._wake_write, b"1")

    def _adopt(self, message: dict[str, Any]) -> dict[str, Any]:
        folder = Path(message["folder"])
        session = json.loads((folder / state.SESSION).read_text())
        if session["launch"]["substrate"] in MACHINES:
            from fathom.sandbox.vm import machine

            return self._enter(machine.adopt(folder), adopted=True)
        return self._enter(boxes.adopt(folder), adopted=True)

    def _destroy(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            box = self.boxes.pop(message["id"], None)
        if box is not None:
            self._end(box)
        return {}

    def _end(self, box: boxes.Box | Machine) -> None:
        self.egress.forget(box.id)
        _kind(box).destroy(box)

    def _container(self, name: str) -> boxes.Box:
        box = self._box(name)
        if not isinstance(box, boxes.Box):
            raise Unsupported(f"{name} is a virtual machine: it is copied as a whole")
        return box

    def _machine(self, name: str) -> Machine:
        box = self._box(name)
        if isinstance(box, boxes.Box):
            raise Unsupported(f"{name} is a container: only virtual machines can do this")
        return box

    def _freeze(self, message: dict[str, Any]) -> dict[str, Any]:
        """Have sandboxes stand still, all or none of them, until `holder` lets them go on."""
        holder = message.get("holder", boxes.PAUSE)
        every = [self._box(name) for name in message["ids"]]
        done: list[boxes.Box | Machine] = []
        try:
            for box in every:
                fresh = not self._holds(box, holder)
                _kind(box).freeze(box, holder)
                done += [box] if fresh else []
        except BaseException:
            for box in done:
                with contextlib.suppress(FathomError, OSError):
                    _kind(box).thaw(box, holder)
            raise
        for box in every if message.get("reclaim") else ():
            if box.group is not None:
                box.group.reclaim()
        return {}

    def _holds(self, box: boxes.Box | Machine, holder: str) -> bool:
        return holder in box.holders if isinstance(box, boxes.Box) else box.frozen is not None

    def _thaw(self, message: dict[str, Any]) -> dict[str, Any]:
        """Let go of sandboxes, of each whatever becomes of the others."""
        holder = message.get("holder", boxes.PAUSE)
        paused: dict[str, float] = {}
        problems: list[Exception] = []
        for name in message["ids"]:
            try:
                box = self._box(name)
                paused[name] = _kind(box).thaw(box, holder)
            except (FathomError, OSError) as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return {"paused": paused}

    def _save(self, message: dict[str, Any]) -> dict[str, Any]:
        box = self._container(message["id"])
        size = boxes.copy_writes(box, Path(message["target"]))
        return {"ids": box.launch.ids, "size": size}

    def _stats(self, message: dict[str, Any]) -> dict[str, Any]:
        box = self._box(message["id"])
        since = box.frozen
        stood = box.stood + (0.0 if since is None else time.monotonic() - since)
        return {"stood": stood} | ({} if box.group is None else {"memory": box.group.memory_used})

    def _net(self, message: dict[str, Any]) -> dict[str, Any]:
        box, policy = self._box(message["id"]), message["policy"]
        opens = any(policy[kind] for kind in ("addresses", "domains", "mirrors"))
        if isinstance(box, boxes.Box):
            return {"version": self.egress.apply(box.id, box.folder, box.net, policy)}
        from fathom.sandbox.vm import machine

        if not opens:
            machine.set_online(box, False)
        version = self.egress.apply(box.id, box.folder, box.net, policy)
        if opens:
            machine.set_online(box, True)
        return {"version": version}

    # Virtual machines --------------------------------------------------------------------------

    def _capture(self, message: dict[str, Any]) -> dict[str, Any]:
        from fathom.sandbox.vm import capture

        name = secrets.token_hex(8)
        self._saved().put(name, capture.capture(self._machine(message["id"])))
        return {"captured": name}

    def _release(self, message: dict[str, Any]) -> dict[str, Any]:
        self._saved().drop(message["captured"])
        return {}

    def _keep(self, message: dict[str, Any]) -> dict[str, Any]:
        from fathom.sandbox.vm import capture

        captured = capture.capture(self._machine(message["id"]))
        try:
            return {"size": captured.write(Path(message["target"]), message["facts"])}
        finally:
            captured.close()

    def _screenshot(self, message: dict[str, Any]) -> dict[str, Any]:
        from fathom.sandbox.vm import capture, screen

        box = self._machine(message["id"])
        name = f"screen-{secrets.token_hex(4)}.png"
        path = box.folder / name
        path.touch(mode=0o600)
        path.write_bytes(screen.png(*capture.screenshot(box)))
        return {"file": name}

    # The end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End every sandbox that is not to outlive this process. Never raises."""
        with self._lock:
            self.stopping = True
            every = list(self.boxes.values())
            ending = [box for box in every if not box.launch.outlive]
            self.boxes.clear()
        self.egress.close()
        threads = [threading.Thread(target=_kind(box).destroy, args=(box,)) for box in ending]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whatever is being made right now sees that the node is stopping.
        for _ in range(_THREADS):
            self._slots.acquire(timeout=15)


def _kind(box: boxes.Box | Machine) -> Any:
    """Return the module that serves this kind of sandbox: both have the same functions."""
    if isinstance(box, boxes.Box):
        return boxes
    from fathom.sandbox.vm import machine

    return machine


def prepare() -> None:
    """Leave the host's mounts alone from here on: they live and die with this process."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    layout = cgroups.current_layout()
    if layout is not None and layout.version == 1 and layout.beside is not None:
        # crun 1.8 refuses v1 with a v2 tree beside it; only this process and what it starts stop
        # seeing that tree.
        syscalls.unmount(str(layout.beside))
        cgroups.current_layout.cache_clear()


def _reap_orphans() -> None:
    """Wait for what container runtimes left to this process; else it stays as zombies for good.

    Orphans become children of the main thread, which starts nothing itself. What other threads
    start they wait for themselves, and it is not looked at here.
    """
    options = os.WEXITED | os.WNOHANG | _WNOTHREAD
    with contextlib.suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, options) is not None:
            pass


def _stop(*_: object) -> None:
    raise SystemExit(0)


def main(argv: list[str]) -> None:
    """Run the node: its socket and its owner's process id come as arguments."""
    owner = socket.socket(fileno=int(argv[0]))
    os.set_inheritable(owner.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    # Each sandbox takes several; a shell's own bound is for programs that must not take many.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    node = Node(owner, int(argv[1]))
    if os.geteuid() == 0:
        prepare()
    try:
        node.serve()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        node.close()


if __name__ == "__main__":
    main(sys.argv[1:])

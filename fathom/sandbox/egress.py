"""A node's side of network policies: rules in namespaces, sockets for the relay, the relay itself.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import messages, net, netns

_CODE = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from fathom.sandbox.relay import main; main(sys.argv[1:])"
)
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT = 20.0
LOG = "network.log"
NOTHING: dict[str, Any] = {"addresses": [], "domains": [], "mirrors": {}}
# One that lived for less than so many seconds is replaced after a pause: it may die of its work.
_SHORT_LIFE, _PAUSE = 2.0, 1.0


def nft_program() -> str | None:
    """Return the path of nft, None where it is not installed."""
    return shutil.which("nft", path=_PATH)


@dataclass(slots=True)
class _Place:
    """What the relay is told of one sandbox. `namespace`: a descriptor, the sandbox's own."""

    folder: Path
    namespace: int
    policy: dict[str, Any]
    version: int


class _Gone(SandboxError):
    """The relay does not answer any more."""


class Egress:
    """The relay of one node, started with the first policy that allows something.

    A relay that dies is replaced at once, and the new one told every policy that is in force.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._versions: dict[str, int] = {}
        self._places: dict[str, _Place] = {}
        self._told: set[str] = set()
        self._closed = False

    def apply(self, name: str, folder: Path, namespace: int, policy: dict[str, Any]) -> int:
        """Set a sandbox's whole policy and return its version. Raises SandboxError, OSError."""
        with self._lock:
            version = self._versions.get(name, 0) + 1
            something = any(policy[kind] for kind in ("addresses", "domains", "mirrors"))
            if something or name in self._places:
                # First what takes away, then what allows: there is no moment with both.
                self._load_rules(namespace, policy)
                self._places[name] = _Place(folder, namespace, policy, version)
                try:
                    self._set(name)
                except BaseException:
                    # Nobody knows how much of it holds: nothing shall, until it is set again.
                    self._places[name].policy = NOTHING
                    raise
            self._versions[name] = version
            return version

    def _set(self, name: str) -> None:
        """Have the relay take a policy; the next one, where this one dies. Raises SandboxError."""
        try:
            if self._control is None:
                self._start()
            self._tell(name)
        except _Gone:
            self._begin_again()
            if name not in self._told:
                raise SandboxError("the network relay ended twice: set the policy again") from None

    def _load_rules(self, namespace: int, policy: dict[str, Any]) -> None:
        program = nft_program()
        if program is None:
            if policy["addresses"]:
                raise Unsupported("an allowlist needs nftables: apt-get install -y nftables")
            return
        text = net.rules(policy["addresses"])

        def load() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, "-f", "-"],
                input=text,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                env={"PATH": _PATH},
                check=False,
            )

        done = netns.inside(namespace, load)
        if done.returncode:
            raise SandboxError(f"nft refused the network policy: {done.stderr.strip()[-500:]}")

    def _tell(self, name: str) -> None:
        place = self._places[name]
        fds: list[int] = []
        try:
            if name not in self._told:
                netns.inside(place.namespace, netns.route_everything_to_loopback)
                for port in (net.RELAY_PORT, net.PROXY_PORT):
                    fds.append(netns.inside(place.namespace, lambda port=port: _listen(port)))
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                fds.append(os.open(place.folder / LOG, flags, 0o600))
            message = {
                "op": "set",
                "id": name,
                "policy": place.policy,
                "version": place.version,
            }
            self._send(message, tuple(fds))
            self._told.add(name)
        finally:
            for fd in fds:
                os.close(fd)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        assert self._control is not None
        try:
            messages.send(self._control, message, fds)
            answer, _ = messages.receive(self._control)
        except OSError as error:
            self._lose()
            raise _Gone(f"the network relay does not answer: {error}") from error
        if answer is None:
            self._lose()
            raise _Gone("the network relay ended")
        if "error" in answer:
            raise SandboxError(f"the network relay could not take the policy: {answer['error']}")

    # A relay that dies -------------------------------------------------------------------------

    def _lose(self) -> None:
        """Forget a relay that is of no use, and end it: the next one is told everything anew."""
        if self._control is not None:
            self._control.close()
        self._control = None
        self._told.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _begin_again(self) -> None:
        """Start another relay and tell it every policy. Raises _Gone, OSError."""
        self._lose()
        self._start()
        for name, place in self._places.items():
            try:
                self._tell(name)
                _note(place)
            except _Gone:
                raise
            except (OSError, SandboxError):
                continue  # a sandbox that is just ending: the others shall have their network

    def _watch(self, process: subprocess.Popen[bytes], began: float) -> None:
        """Replace this relay when it ends, unless somebody has already."""
        _await_end(process.pid)
        pause = 0.0 if time.monotonic() - began > _SHORT_LIFE else _PAUSE
        while True:
            time.sleep(pause)
            pause = _PAUSE
            with self._lock:
                if self._closed or self._process is not process:
                    return
                with contextlib.suppress(OSError, SandboxError):
                    self._begin_again()
                    return

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _CODE, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={"PATH": _PATH},
                    cwd="/",
                )
        except BaseException:
            ours.close()
            raise
        ours.settimeout(_TIMEOUT)
        self._process, self._control = process, ours
        watcher = threading.Thread(
            target=self._watch, args=(process, time.monotonic()), name="relay", daemon=True
        )
        watcher.start()

    # The end -----------------------------------------------------------------------------------

    def forget(self, name: str) -> None:
        """Close what a sandbox had open. Never raises."""
        with self._lock:
            self._versions.pop(name, None)
            self._places.pop(name, None)
            if name in self._told:
                self._told.discard(name)
                with contextlib.suppress(SandboxError):
                    self._send({"op": "drop", "id": name}, ())

    def close(self) -> None:
        """End the relay. Never raises."""
        with self._lock:
            self._closed = True
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                self._process.kill()
                self._process.wait()


def _await_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return  # it has ended, and somebody has waited for it
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.poll()
    finally:
        os.close(fd)


def _note(place: _Place) -> None:
    """Tell a sandbox's log that its connections were cut, and its policy holds again."""
    line = {"time": round(time.time(), 3), "policy": place.version, "kind": "relay_restarted"}
    with contextlib.suppress(OSError), (place.folder / LOG).open("a") as log:
        log.write(json.dumps({**line, "allowed": False}) + "\n")


def _listen(port: int) -> int:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(128)
    return sock.detach()

"""A node's side of network policies: rules in namespaces, sockets for the relay, the relay itself.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
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
NOTHING: dict[str, Any] = {"addresses": [], "domains": [], "mirrors": {}, "private": False}


def nft_program() -> str | None:
    """Return the path of nft, None where it is not installed."""
    return shutil.which("nft", path=_PATH)


class Egress:
    """The relay of one node, started with the first policy that allows something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._versions: dict[str, int] = {}
        self._open: set[str] = set()

    def apply(self, name: str, folder: Path, namespace: int, policy: dict[str, Any]) -> int:
        """Set a sandbox's whole policy and return its version. Raises SandboxError, OSError."""
        with self._lock:
            version = self._versions.get(name, 0) + 1
            something = any(policy[kind] for kind in ("addresses", "domains", "mirrors"))
            if something or name in self._open:
                # First what takes away, then what allows: there is no moment with both.
                self._load_rules(namespace, policy)
                self._tell(name, folder, namespace, policy, version)
            self._versions[name] = version
            return version

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

    def _tell(
        self, name: str, folder: Path, namespace: int, policy: dict[str, Any], version: int
    ) -> None:
        fds: list[int] = []
        try:
            if name not in self._open:
                netns.inside(namespace, netns.route_everything_to_loopback)
                for port in (net.RELAY_PORT, net.PROXY_PORT):
                    fds.append(netns.inside(namespace, lambda port=port: _listen(port)))
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                fds.append(os.open(folder / LOG, flags, 0o600))
            message = {"op": "set", "id": name, "policy": policy, "version": version}
            self._send(message, tuple(fds))
            self._open.add(name)
        finally:
            for fd in fds:
                os.close(fd)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        if self._control is None:
            self._start()
        assert self._control is not None
        try:
            messages.send(self._control, message, fds)
            answer, _ = messages.receive(self._control)
        except OSError as error:
            self._lose()
            raise SandboxError(f"the network relay does not answer: {error}") from error
        if answer is None:
            self._lose()
            raise SandboxError("the network relay ended: set the policy again")

    def _lose(self) -> None:
        """Forget a relay that is of no use, and end it: the next one is told everything anew."""
        assert self._control is not None
        self._control.close()
        self._control = None
        self._open.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CODE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"PATH": _PATH},
                cwd="/",
            )
        ours.settimeout(_TIMEOUT)
        self._control = ours

    def forget(self, name: str) -> None:
        """Close what a sandbox had open. Never raises."""
        with self._lock:
            self._versions.pop(name, None)
            if name in self._open:
                self._open.discard(name)
                with contextlib.suppress(SandboxError):
                    self._send({"op": "drop", "id": name}, ())

    def close(self) -> None:
        """End the relay. Never raises."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                self._process.kill()
                self._process.wait()


def _listen(port: int) -> int:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(128)
    return sock.detach()

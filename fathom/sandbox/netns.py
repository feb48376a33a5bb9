"""Network namespaces of sandboxes, made in advance and owned by this machine's own users.

A namespace that the sandbox's runtime made would belong to the sandbox: its root could change it.
One that was made here can only be entered, so rules inside of it hold for everybody inside.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

from fathom.sandbox import syscalls

T = TypeVar("T")

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def loopback_up() -> None:
    """Turn on the loopback device of this thread's namespace. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends afterwards: what it unshared ends with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def make() -> int:
    """Return a descriptor of a new namespace with nothing but loopback. Raises OSError."""

    def work() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        loopback_up()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_own_thread(work)


def inside(namespace: int, work: Callable[[], T]) -> T:
    """Run `work` in a thread inside the namespace. Raises what it raises, and OSError."""

    def enter() -> T:
        syscalls.setns(namespace, syscalls.CLONE_NEWNET)
        return work()

    return _in_own_thread(enter)


class Pool:
    """Namespaces in advance: making one waits for the kernel far longer than it works."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ready: list[int] = []
        self._lock = threading.Lock()
        self._filling = False

    def take(self) -> int:
        """Return a namespace's descriptor, the caller's to close. Raises OSError."""
        with self._lock:
            found = self._ready.pop() if self._ready else None
        self._refill()
        return make() if found is None else found

    def _refill(self) -> None:
        with self._lock:
            if self._filling or len(self._ready) >= self._size:
                return
            self._filling = True
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                made = make()
                with self._lock:
                    self._ready.append(made)
                    if len(self._ready) >= self._size:
                        break
        with self._lock:
            self._filling = False


def route_everything_to_loopback() -> None:
    """Give this thread's namespace an address and a route, so that its rules see connections.

    Nothing leaves by it: what the rules do not turn to the relay is refused. Raises OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.bind((0, 0))
        index = socket.if_nametoindex("lo")
        local = socket.inet_aton("10.255.255.1")
        address = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, index)
        address += struct.pack("=HH4s", 8, 2, local)  # IFA_LOCAL
        _netlink(sock, 20, address)  # RTM_NEWADDR
        # family, lengths, tos, table main, protocol boot, scope link, type unicast, flags
        route = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 3, 253, 1, 0)
        route += struct.pack("=HHI", 8, 4, index)  # RTA_OIF
        _netlink(sock, 24, route)  # RTM_NEWROUTE


def _netlink(sock: socket.socket, kind: int, body: bytes) -> None:
    flags = 0x1 | 0x4 | 0x100 | 0x400  # request, acknowledge, replace, create
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    answer = sock.recv(4096)
    (error,) = struct.unpack_from("=i", answer, 16)
    if error:
        raise OSError(-error, f"rtnetlink {kind}: {os.strerror(-error)}")

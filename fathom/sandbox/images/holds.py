"""Holds: what keeps a store's files from being collected while a process needs them.

A hold is a file of digests that each process in need of them has open and locked. The kernel lets
go of the lock when the last of them ends, in whatever way, so nothing is guessed about processes.

Paper: none (housekeeping).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from fathom.sandbox.images.errors import ImageError


class Hold:
    """Keeps digests from being collected while it is open, at most as long as this process lives.

    A process that was given `fileno` keeps them too; one of the same path takes up what is held.
    A context manager; `close` may be called twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        while True:
            # What others are given can only be read: the lock is all that they need.
            self._fd = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            # Before it was locked it may have been taken for that of a dead process.
            if os.fstat(self._fd).st_nlink:
                break
            os.close(self._fd)
        self._digests = set(path.read_text().split())

    def fileno(self) -> int:
        """Return the descriptor whose copies hold the digests as well, in whatever process."""
        return self._fd

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, *digests: str) -> None:
        """Hold more digests."""
        with self._lock:
            if self._fd < 0:
                raise ImageError("this hold was closed: take another one")
            new = set(digests) - self._digests
            self._write(new, os.O_APPEND)
            self._digests |= new

    def drop(self, digests: set[str]) -> None:
        """Hold these no longer."""
        with self._lock:
            self._digests -= digests
            if self._fd >= 0:
                self._write(self._digests, os.O_TRUNC)

    def _write(self, digests: set[str], how: int) -> None:
        text = "".join(f"{digest}\n" for digest in sorted(digests))
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_CLOEXEC | how)
        with open(fd, "w") as file:
            file.write(text)

    def close(self) -> None:
        """Let go of everything, on behalf of all."""
        with self._lock:
            if self._fd >= 0:
                self._path.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Let go of everything in this process alone."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def held(folder: Path) -> Iterator[str]:
    """Yield what living processes hold, and remove the holds of those that ended.

    Only for whoever has the store's lock alone.
    """
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield from path.read_text().split()
                else:
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)

"""Contents of layers fetched when they are first read.

The kernel mounts a layer's metadata image from the local disk; its data blobs are files of a small
FUSE file system served by this module in a process of its own. A read that meets a chunk which is
not here fetches it from where the blob is, proves it against the blob's list of digests and keeps
it in a sparse file, from which every later sandbox reads. Bytes that cannot be fetched or proven
are an input/output error in the sandbox, never zeros. What is here is answered at once, however
many reads wait for a slow store, and no read waits for ever.

The server lives exactly as long as something uses its files: its own mount is detached at once, and
when the last layer that was mounted from it is gone the kernel ends it.

Paper: §5.2.5 (contents are read on demand, in chunks, through a local cache).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fathom.errors import Unsupported
from fathom.sandbox import syscalls
from fathom.sandbox.images.blobs import CHUNK
from fathom.sandbox.images.errors import ImageDamaged, ImageError, ImageMissing, store_errors
from fathom.sandbox.images.remote import Source, open_source
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import Blob

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_READERS = 2
_FETCHERS = 8
# Seconds after which a read that waits for its turn, or for what another one fetches, is given up.
_PATIENCE = 60.0
_MS_RDONLY = 1


class BlobCache:
    """A data blob of which only some chunks are here. Safe for several threads and processes.

    The map beside the sparse file has one byte for each chunk, after the boot in which it was
    written: a chunk of an earlier boot is proven again, because a power cut may have lost its
    bytes and kept its mark.
    """

    def __init__(self, store: Store, blob: Blob) -> None:
        self._store = store
        self._blob = blob
        self._chunks = store.chunks(blob)
        self._opened: dict[str, Source] = {}
        self._lock = threading.Lock()
        self._busy: dict[int, threading.Event] = {}
        path = store.cache_path(blob.digest)
        with store_errors("the cache of contents cannot be used", store.folder):
            path.parent.mkdir(mode=0o755, exist_ok=True)
            self._path = path
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._file, blob.size)
            self._map_file = os.open(
                path.with_name(f"{path.name}.map"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        self._known = self._read_map()

    def _read_map(self) -> bytearray:
        boot = _BOOT.read_bytes()[:36]
        found = os.pread(self._map_file, 36 + len(self._chunks), 0)
        marks = bytearray(found[36:].ljust(len(self._chunks), b"\0"))
        if found[:36] != boot:
            # 2: probably here, to be proven before it is used.
            marks = bytearray(2 if mark else 0 for mark in marks)
            os.pwrite(self._map_file, boot + bytes(marks), 0)
        return marks

    @property
    def present(self) -> int:
        """How many bytes of the blob are here."""
        return sum(self._chunks.length(n) for n, mark in enumerate(self._read_map()) if mark)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the blob, fetching what is missing. Raises OSError, ImageError."""
        end = min(offset + size, self._blob.size)
        if end <= offset:
            return b""
        for number in range(offset // CHUNK, -(-end // CHUNK)):
            if self._known[number] != 1:
                self._ensure(number)
        return os.pread(self._file, end - offset, offset)

    def has(self, offset: int, size: int) -> bool:
        """Tell whether these bytes are here and proven."""
        end = min(offset + size, self._blob.size)
        return all(self._known[n] == 1 for n in range(offset // CHUNK, -(-end // CHUNK)))

    def complete(self) -> None:
        """Fetch everything that is missing and keep the blob as a whole. Raises ImageError."""
        try:
            for number in range(len(self._chunks)):
                if self._known[number] != 1:
                    self._ensure(number)
            with store_errors("the contents cannot be kept", self._store.folder):
                os.fsync(self._file)
                self._store.adopt_cache(self._blob)
        except OSError as error:
            raise ImageError(f"{self._blob.digest} cannot be fetched: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the files."""
        for fd in (self._file, self._map_file):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._file = self._map_file = -1

    def _ensure(self, number: int) -> None:
        while True:
            with self._lock:
                if self._known[number] == 1:
                    return
                waiting = self._busy.get(number)
                if waiting is None:
                    self._busy[number] = threading.Event()
                    break
            if not waiting.wait(_PATIENCE):
                raise OSError(errno.ETIMEDOUT, "the store is silent")
        try:
            self._fill(number)
        finally:
            with self._lock:
                self._busy.pop(number).set()

    def _fill(self, number: int) -> None:
        start, length = number * CHUNK, self._chunks.length(number)
        mark = os.pread(self._map_file, 1, 36 + number)
        here = mark in (b"\1", b"\2") and self._chunks.matches(
            number, os.pread(self._file, length, start)
        )
        if not here:
            data = self._fetch(number, start, length)
            with store_errors("the cache of contents is full", self._store.folder):
                # A chunk of zeros is a hole already.
                if os.pread(self._file, length, start) != data:
                    os.pwrite(self._file, data, start)
        os.pwrite(self._map_file, b"\1", 36 + number)
        self._known[number] = 1

    def _fetch(self, number: int, start: int, length: int) -> bytes:
        problems: list[str] = []
        for address in self._store.origins(self._blob.digest):
            try:
                data = self._source(address).read(start, start + length)
            except OSError as error:
                problems.append(f"{address}: {error}")
                continue
            if self._chunks.matches(number, data):
                return data
            problems.append(f"{address}: chunk {number} is damaged")
        if not problems:
            raise ImageMissing(f"it is not known where the contents {self._blob.digest} are")
        raise ImageDamaged(f"contents cannot be fetched: {'; '.join(problems)}")

    def _source(self, address: str) -> Source:
        with self._lock:
            if address in self._opened:
                return self._opened[address]
        source = open_source(address)
        with self._lock:
            self._opened[address] = source
        return source


def serve_blobs(store: Store, blobs: Sequence[Blob], target: Path) -> None:
    """Mount a file system at the folder `target` with one file for each blob, named by its digits.

    Its process holds the blobs and ends when nothing uses the files any more; detach the mount once
    they are in use. Raises Unsupported where FUSE may not be used, ImageError.
    """
    for blob in blobs:
        for address in store.origins(blob.digest):
            if address.startswith("memory://"):
                raise Unsupported(
                    f"{address} exists in this process only and cannot be read on demand by the "
                    "kernel: fetch the image first"
                )
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(
            f"contents cannot be read on demand, /dev/fuse cannot be opened ({error.strerror}): "
            "fetch the image first"
        ) from error
    try:
        options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        flags = _MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID
        try:
            syscalls.mount("fathom", str(target), "fuse", flags, f"{options},allow_other")
        except OSError as error:
            raise Unsupported(f"contents cannot be read on demand: {error}") from error
        try:
            _start(store, blobs, fd)
        except BaseException:
            syscalls.unmount(str(target))
            raise
    finally:
        os.close(fd)


def _start(store: Store, blobs: Sequence[Blob], fd: int) -> None:
    names = [f"{blob.digest}:{blob.size}" for blob in blobs]
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fathom.sandbox.images.ondemand"),
                *(str(store.folder.absolute()), str(fd), str(write_end), *names),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(fd, write_end),
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        os.close(write_end)
        write_end = -1
        said = os.read(read_end, 4096)
        # Nobody waits for the server: it is left to the process that started it, or to init.
        threading.Thread(target=process.wait, daemon=True).start()
        if said != b"ready":
            problem = said.decode(errors="replace") or "it gave no reason"
            raise ImageError(f"the server of contents did not start: {problem}")
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_FOREVER = 1 << 30
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS = 1, 2, 3, 14, 15, 17
_RELEASE, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 18, 25, 26, 27, 28, 29
_ACCESS, _INTERRUPT, _DESTROY, _BATCH_FORGET = 34, 36, 38, 42
_KEEP_CACHE = 2
_ASYNC_READ, _MAX_PAGES = 1, 1 << 22


class Server:
    """Answers the kernel's requests for a flat, read-only folder of blobs."""

    def __init__(self, fd: int, files: Sequence[tuple[bytes, int, BlobCache]]) -> None:
        self._fd = fd
        self._files = files
        self._waiting: queue.SimpleQueue[tuple[int, int, bytes, float]] = queue.SimpleQueue()
        self._numbers = {name: place + 2 for place, (name, _, _) in enumerate(files)}

    def run(self) -> None:
        """Serve until the last user is gone."""
        readers = [threading.Thread(target=self._loop, daemon=True) for _ in range(_READERS)]
        fetchers = [threading.Thread(target=self._fetch, daemon=True) for _ in range(_FETCHERS)]
        for thread in (*readers, *fetchers):
            thread.start()
        for thread in readers:
            thread.join()
        # What is still being fetched is for nobody any more.

    def _fetch(self) -> None:
        """Answer reads that may take long, in the order in which they came."""
        while True:
            unique, node, body, asked = self._waiting.get()
            answer = (errno.EIO, b"")
            if time.monotonic() - asked < _PATIENCE:
                answer = self._read(node, body)
            self._reply(unique, *answer)

    def _loop(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 17)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                return  # ENODEV: unmounted
            if len(request) < _IN.size:
                return
            _, code, unique, node, *_ = _IN.unpack_from(request)
            if code in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            body = request[_IN.size :]
            if code == _READ and not self._is_here(node, body):
                self._waiting.put((unique, node, body, time.monotonic()))
            else:
                self._reply(unique, *self._answer(code, node, body))

    def _reply(self, unique: int, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            # A request that was interrupted meanwhile has no one to answer to.
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), -status, unique) + body)

    def _answer(self, code: int, node: int, body: bytes) -> tuple[int, bytes]:
        if code == _INIT:
            return 0, self._init(body)
        if code == _LOOKUP:
            number = self._numbers.get(body.rstrip(b"\0"))
            if node != 1 or number is None:
                return errno.ENOENT, b""
            head = struct.pack("<QQQQII", number, 0, _FOREVER, _FOREVER, 0, 0)
            return 0, head + self._attributes(number)
        if code == _GETATTR:
            return 0, struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node)
        if code == _READ:
            return self._read(node, body)
        if code in (_OPEN, _OPENDIR):
            return 0, struct.pack("<QII", 0, _KEEP_CACHE, 0)
        if code == _READDIR:
            return 0, b""
        if code == _STATFS:
            return 0, struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if code in (_RELEASE, _RELEASEDIR, _FLUSH, _ACCESS, _DESTROY):
            return 0, b""
        return errno.ENOSYS, b""

    @staticmethod
    def _init(body: bytes) -> bytes:
        _, minor, ahead, flags = struct.unpack_from("<IIII", body)
        flags &= _ASYNC_READ | _MAX_PAGES
        return struct.pack(
            "<IIIIHHIIHHI28x", 7, min(minor, 31), ahead, flags, 16, 12, 4096, 1, 256, 0, 0
        )

    def _attributes(self, number: int) -> bytes:
        if number == 1:
            size, mode, links = 0, 0o040555, 2
        else:
            size, mode, links = self._files[number - 2][1], 0o100444, 1
        blocks = -(-size // 512)
        return _ATTR.pack(number, size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)

    def _is_here(self, node: int, body: bytes) -> bool:
        offset, size = struct.unpack_from("<8xQI", body)
        return self._files[node - 2][2].has(offset, size)

    def _read(self, node: int, body: bytes) -> tuple[int, bytes]:
        offset, size = struct.unpack_from("<8xQI", body)
        try:
            return 0, self._files[node - 2][2].read(offset, size)
        except (OSError, ImageError) as error:
            log.error("blob=%s offset=%d problem=%s", self._files[node - 2][0], offset, error)
            return errno.EIO, b""


def _leave_mounts(store: Store) -> None:
    """Stop seeing the layers and stacks of others.

    A namespace keeps its mounts alive, and layers keep their server alive: a server in the same
    namespace as what it serves would never end.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    layers: list[str] = []
    stacks: list[tuple[str, str]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        place = head.split()[4].encode().decode("unicode_escape")
        kind, source, options = tail.split(" ", 2)
        if kind == "erofs" and source.startswith((f"{store.folder}/", "/dev/loop")):
            layers.append(place)
        elif kind == "overlay":
            stacks.append((place, options))
    for place, options in reversed(stacks):
        if any(layer in options for layer in layers):
            syscalls.unmount(place)
    for place in reversed(layers):
        syscalls.unmount(place)


def main(arguments: Sequence[str]) -> None:
    """Serve: the store's folder, the FUSE descriptor, the descriptor to answer on, the blobs."""
    folder, fd, ready, *names = arguments
    said = int(ready)
    try:
        store = Store(folder)
        _leave_mounts(store)
        logging.basicConfig(
            filename=store.folder / "ondemand.log",
            format="time=%(asctime)s pid=%(process)d level=%(levelname)s %(message)s",
        )
        files: list[tuple[bytes, int, BlobCache]] = []
        for name in names:
            digest, _, size = name.rpartition(":")
            blob = Blob(digest=digest, size=int(size))
            files.append((digest[7:].encode(), blob.size, BlobCache(store, blob)))
        hold = store.hold(*(name.rpartition(":")[0] for name in names))
    except Exception as error:
        os.write(said, str(error).encode()[:4000])
        return
    os.write(said, b"ready")
    os.close(said)
    with hold:
        Server(int(fd), files).run()


if __name__ == "__main__":
    main(sys.argv[1:])

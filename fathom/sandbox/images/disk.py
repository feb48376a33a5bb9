"""Disks of virtual machines: read-only bases made of layers, copy-on-write disks, snapshots.

A base is one raw file: EROFS (made without privileges, contents of all layers in one file) or ext4.
A machine writes to a qcow2 file on top of it; a snapshot freezes that file and goes on in a new
one, so snapshots are chains and a fork is one more file on a frozen one.

Paper: §5.2.5 (disks of virtual machines, incremental snapshots).
"""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from fathom.errors import MissingDependency
from fathom.sandbox.images import erofs, tree, unpack
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images.blobs import end_sparsely, write_sparsely
from fathom.sandbox.images.errors import ImageDamaged, ImageError, store_errors
from fathom.sandbox.images.source import is_root
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tarball import open_blobs
from fathom.sandbox.images.tree import Node
from fathom.sandbox.images.types import Image

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PIECE = 1 << 20
_TIMEOUT = 600.0
_CHAIN = 64
# One identity for all: the same layers give the same bytes.
_UUID = "00000000-0000-4000-8000-000000000000"


def _run(name: str, package: str, *words: str, **environment: str) -> str:
    program = shutil.which(name, path=_PATH)
    if program is None:
        raise MissingDependency(f"{name} is not installed: `apt-get install -y {package}`")
    done = subprocess.run(
        [program, *words],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
        stdin=subprocess.DEVNULL,
        env={"PATH": _PATH, "LC_ALL": "C", **environment},
    )
    if done.returncode:
        raise ImageError(f"{name} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    return done.stdout


def write_base(
    store: Store,
    image: Image,
    path: Path,
    *,
    kind: Literal["erofs", "ext4"] = "erofs",
    room: int = 64 << 20,
) -> None:
    """Write what `image` shows as one raw disk; the file appears whole or not at all.

    `room`: free bytes on an ext4 disk. The same image gives the same bytes. Raises ImageError,
    MissingDependency, StoreFull.
    """
    part = path.with_name(f".{path.name}.part")
    with store_errors(f"the disk {path} cannot be written", path.parent):
        try:
            if kind == "erofs":
                _write_erofs(store, image, part)
            else:
                _write_ext4(store, image, part, room)
            part.chmod(0o444)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _write_erofs(store: Store, image: Image, path: Path) -> None:
    root, blobs = layering.joined(store, image.layers, bottom=True)
    sizes = [blob.size for blob in blobs]
    with path.open("wb") as out, open_blobs(store, blobs) as files:
        out.write(erofs.write(root, sizes, joined=True))
        for blob, file in zip(blobs, files, strict=True):
            left = blob.size
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ImageDamaged(f"the blob {blob.digest} is shorter than its layer says")
                write_sparsely(cast("BinaryIO", out), piece)
                left -= len(piece)
            write_sparsely(cast("BinaryIO", out), bytes(-blob.size % erofs.BLOCK))
        end_sparsely(cast("BinaryIO", out))


def _write_ext4(store: Store, image: Image, path: Path, room: int) -> None:
    root, blobs = layering.joined(store, image.layers, bottom=True)
    with store.making(f"the disk {path} cannot be written") as work:
        unpack.write_tree(store, root, blobs, work / "tree")
        nodes = [node for _, node in tree.walk(root)]
        size = sum(-(-node.size // 4096) * 4096 + 4096 for node in nodes)
        size = -(-(size + size // 16 + room + (16 << 20)) // (1 << 20))
        _run(
            "mke2fs",
            "e2fsprogs",
            "-q",
            "-t",
            "ext4",
            "-U",
            _UUID,
            "-E",
            f"hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
            "-N",
            str(len(nodes) * 2 + 1024),
            "-m",
            "0",
            "-b",
            "4096",
            "-d",
            str(work / "tree"),
            str(path),
            f"{size}M",
            E2FSPROGS_FAKE_TIME="1",
        )
        # Without privileges the folder lost owners, some modes and devices; times of access vary.
        script = work / "script"
        script.write_text("".join(_corrections(root)))
        _run("debugfs", "e2fsprogs", "-w", "-f", str(script), str(path), E2FSPROGS_FAKE_TIME="1")


def _corrections(root: Node) -> list[str]:
    lines: list[str] = []
    seen: set[int] = set()
    for path, node in tree.walk(root):
        if id(node) in seen:
            continue
        seen.add(id(node))
        name = path.decode("utf-8", "surrogateescape")
        if '"' in name or "\n" in name or "\udc80" <= max(name, default=" ") <= "\udcff":
            # The tool cannot name it; it keeps what the folder had.
            continue
        place = f'"/{name}"'
        kind = stat.S_IFMT(node.mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and not is_root():
            letter = "c" if kind == stat.S_IFCHR else "b"
            major, minor = node.rdev >> 8 & 0xFFF, node.rdev & 0xFF
            lines.append(f"mknod {place} {letter} {major} {minor}\n")
        lines.append(f"sif {place} uid {node.uid}\nsif {place} gid {node.gid}\n")
        lines.append(f"sif {place} mode 0{node.mode:o}\n")
        lines += [f"sif {place} {field} @{node.mtime}\n" for field in ("atime", "ctime", "mtime")]
        lines += [f"sif {place} crtime @{node.mtime}\n"]
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A copy-on-write disk of a virtual machine: a qcow2 file on top of others.

    The machine that writes to it must be stopped, or switched to the new file by its own monitor,
    before `snapshot`; `qemu-img` refuses a file that is in use.
    """

    path: Path

    @staticmethod
    def create(
        path: Path, base: Path, *, size: int | None = None, base_format: str = "raw"
    ) -> Disk:
        """Make a disk on top of `base`, which never changes. `size` in bytes, at least the base's.

        Raises ImageError when the file exists, MissingDependency.
        """
        if path.exists():
            raise ImageError(f"the disk {path} exists: choose another name")
        base = base.resolve(strict=True)
        words = ["create", "-q", "-f", "qcow2", "-F", base_format, "-b", str(base), str(path)]
        with store_errors(f"the disk {path} cannot be made", path.parent):
            _run("qemu-img", "qemu-utils", *words, *([str(size)] if size is not None else []))
        return Disk(path=path)

    def chain(self) -> tuple[Path, ...]:
        """Return this file and all that it rests on, the base last. Raises ImageDamaged.

        Only files beside this one or named by it directly are followed, at most 64.
        """
        text = _run(
            "qemu-img",
            "qemu-utils",
            "info",
            "-U",
            "--backing-chain",
            "--output=json",
            str(self.path),
        )
        found = cast("list[Mapping[str, Any]]", json.loads(text))
        if len(found) > _CHAIN:
            raise ImageDamaged(f"{self.path} rests on more than {_CHAIN} files")
        return tuple(Path(str(one["filename"])) for one in found)

    def fork(self, path: Path) -> Disk:
        """Make another disk on top of this one, which must not be written to any more."""
        self.path.chmod(0o444)
        return Disk.create(path, self.path, base_format="qcow2")

    def snapshot(self, frozen: Path) -> Disk:
        """Freeze what was written so far under the name `frozen`; this file goes on, empty.

        Returns the frozen disk, from which others can be forked. Raises ImageError.
        """
        if frozen.exists():
            raise ImageError(f"the snapshot {frozen} exists: choose another name")
        self.check()
        self.path.rename(frozen)
        try:
            Disk(path=frozen).fork(self.path)
        except BaseException:
            self.path.unlink(missing_ok=True)
            frozen.chmod(0o644)
            frozen.rename(self.path)
            raise
        return Disk(path=frozen)

    def check(self) -> None:
        """Prove the disk's own tables. Raises ImageDamaged for errors, ImageError if in use."""
        try:
            _run("qemu-img", "qemu-utils", "check", "-q", "-f", "qcow2", str(self.path))
        except ImageError as error:
            if "lock" in str(error):
                raise
            raise ImageDamaged(f"the disk {self.path} is damaged: {error}") from error

    def flatten(self, path: Path, *, keep: Path | None = None) -> Disk:
        """Write this disk and all below it, down to the base `keep`, as one file at `path`."""
        part = path.with_name(f".{path.name}.part")
        with store_errors(f"the disk {path} cannot be written", path.parent):
            try:
                if keep is None:
                    words = ["convert", "-q", "-O", "qcow2", str(self.path), str(part)]
                else:
                    # Takes over what lies between this file and the base, and nothing else.
                    shutil.copyfile(self.path, part)
                    words = ["rebase", "-q", "-f", "qcow2", "-F", "raw"]
                    words += ["-b", str(keep.resolve()), str(part)]
                _run("qemu-img", "qemu-utils", *words)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return Disk(path=path)


def unused(disks: Sequence[Disk], folder: Path) -> list[Path]:
    """Return the qcow2 files of a folder on which none of `disks` rests."""
    needed = {path.resolve() for disk in disks for path in disk.chain()}
    return sorted(p for p in folder.glob("*.qcow2") if p.resolve() not in needed)

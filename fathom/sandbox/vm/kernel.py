"""The guest's kernel and the initramfs with our agent in it.

The kernel is the one of Debian's package for cloud machines, fetched by the package tools (which
prove signatures) and kept in the cache folder. Its image is taken apart: an uncompressed kernel
starts a third sooner under emulation. The initramfs is a cpio archive with the agent as /init and
the few modules that lead to a disk and a port.

Paper: §5.2.5 (microVM and full VM substrates).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import MissingDependency, SandboxError
from fathom.sandbox.images import debian
from fathom.sandbox.images.errors import BuildFailed
from fathom.sandbox.vm import lz4

PACKAGE = "linux-image-cloud-amd64"
# What each machine needs to reach its disk and its port; what these need is found out.
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "erofs", "overlay")
# Loaded by the agent once a network policy allows something.
LATER = ("virtio_net",)
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: `image` is its uncompressed program, `modules` their folder."""

    folder: Path

    @property
    def image(self) -> Path:
        """The kernel's program, an ELF file."""
        return self.folder / "vmlinux"

    @property
    def packed(self) -> Path:
        """The kernel as the package has it, whose own beginning also finds out about the screen."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The folder of its modules."""
        return self.folder / "modules"

    @property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return (self.folder / "release").read_text()


def find(cache: Path) -> Kernel:
    """Return the guest's kernel, fetching and unpacking it on first use.

    Raises MissingDependency where the package tools are missing, SandboxError where they fail.
    """
    folder = cache / "vm" / f"kernel-{_VERSION}"
    if (folder / "release").is_file():
        return Kernel(folder)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    work = Path(tempfile.mkdtemp(prefix=".kernel-", dir=folder.parent))
    try:
        _unpack(work)
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            # Another process was quicker, which is as good.
            if not (folder / "release").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Kernel(folder)


def _unpack(work: Path) -> None:
    program = shutil.which("dpkg-deb")
    if program is None:
        raise MissingDependency(
            "the guest's kernel comes as a Debian package and dpkg-deb is not installed: "
            "`apt-get install -y dpkg`"
        )
    status = _everything_but_the_kernel()
    try:
        files = debian.download([PACKAGE], work / "packages", status)
    except BuildFailed:
        # A fresh machine has no lists of packages yet, or old ones.
        try:
            files = debian.download([PACKAGE], work / "packages", status, lists=work / "lists")
        except BuildFailed as error:
            raise SandboxError(f"the guest's kernel cannot be fetched: {error}") from error
    package = next(p for p in files if re.match(r"linux-image-\d.*-cloud-amd64_", p.name))
    tree = work / "tree"
    subprocess.run([program, "-x", str(package), str(tree)], check=True, timeout=300)
    image = next((tree / "boot").glob("vmlinuz-*"))
    folders = [tree / "lib/modules", tree / "usr/lib/modules"]
    modules = next(m for folder in folders if folder.is_dir() for m in folder.iterdir())
    (work / "vmlinux").write_bytes(extract(image.read_bytes()))
    (work / "vmlinux").chmod(0o444)
    shutil.copyfile(image, work / "vmlinuz")
    (work / "vmlinuz").chmod(0o444)
    modules.rename(work / "modules")
    shutil.rmtree(tree)
    shutil.rmtree(work / "packages")
    shutil.rmtree(work / "lists", ignore_errors=True)
    (work / "release").write_text(image.name.removeprefix("vmlinuz-"))


def _everything_but_the_kernel() -> bytes:
    """Return a record of installed packages in which the kernel's own needs are met."""
    needs = ("linux-base", "kmod", "initramfs-tools", "linux-initramfs-tool")
    return b"".join(
        f"Package: {name}\nStatus: install ok installed\nVersion: 99\nArchitecture: all\n"
        f"Maintainer: nobody\nDescription: not needed here\n\n".encode()
        for name in needs
    )


def extract(image: bytes) -> bytes:
    """Return the ELF program inside a compressed kernel image (bzImage). Raises SandboxError."""
    if image[0x202:0x206] == b"" or image[0x1FE:0x200] != b"\x55\xaa":
        raise SandboxError("the kernel image is not one of an x86 machine")
    # Linux boot protocol: sectors of setup code, then where in the rest the payload lies.
    start = (image[0x1F1] + 1) * 512
    offset, size = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + size]
    if payload.startswith(lz4.LEGACY_MAGIC):
        program = lz4.decompress_legacy(payload)
    elif payload.startswith(b"\xfd7zXZ"):
        import lzma

        # What follows the stream is the length of what it holds.
        program = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        import zlib

        program = zlib.decompressobj(31).decompress(payload)
    else:
        raise SandboxError(
            f"the kernel is compressed in a way not known here ({payload[:4].hex()})"
        )
    if not program.startswith(b"\x7fELF"):
        raise SandboxError("the kernel image holds no ELF program")
    return program


def module_order(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Return the files of `wanted` and all that they need, each after what it needs.

    What is built into the kernel is left out. Raises SandboxError for a module that is not there.
    """
    files = {path.stem.replace("-", "_"): path for path in sorted(modules.rglob("*.ko"))}
    builtin = {
        Path(line).stem.replace("-", "_")
        for line in (modules / "modules.builtin").read_text().splitlines()
    }
    found: list[Path] = []
    seen: set[str] = set()

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in seen or name in builtin:
            return
        seen.add(name)
        if name not in files:
            raise SandboxError(f"the guest's kernel has no module {name}")
        for other in _needs(files[name].read_bytes()):
            add(other)
        found.append(files[name])

    for name in wanted:
        add(name)
    return found


def _needs(module: bytes) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return match[1].decode().split(",") if match and match[1] else []


def initramfs(kernel: Kernel, agent: Path, cache: Path) -> Path:
    """Return the initramfs for this kernel and agent, making it when it is missing."""
    parts: list[tuple[str, int, bytes]] = [
        (name, 0o40755, b"") for name in ("dev", "proc", "sys", "sysroot", "modules", "later")
    ]
    parts.append(("init", 0o100755, agent.read_bytes()))
    early = module_order(kernel.modules, MODULES)
    for place, path in enumerate(early):
        parts.append((f"modules/{place:02}-{path.name}", 0o100644, path.read_bytes()))
    late = [p for p in module_order(kernel.modules, LATER) if p not in early]
    for place, path in enumerate(late):
        parts.append((f"later/{place:02}-{path.name}", 0o100644, path.read_bytes()))
    data = b"".join(_cpio(parts))
    target = cache / "vm" / f"initramfs-{hashlib.blake2b(data, digest_size=10).hexdigest()}"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(data)
        Path(file.name).chmod(0o444)
        Path(file.name).rename(target)
    return target


def _cpio(parts: list[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Write a cpio archive of the "newc" form, its first part the folder "dev".

    The console that is put in there makes early errors visible.
    """
    entries = [(*part, (0, 0)) for part in parts]
    entries.insert(1, ("dev/console", 0o020600, b"", (5, 1)))
    for number, (name, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))]):
        raw = name.encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        head = b"070701" + b"".join(b"%08x" % value for value in fields)
        yield head + raw + bytes(-(len(head) + len(raw)) % 4)
        yield data + bytes(-len(data) % 4)

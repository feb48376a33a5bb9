"""The emulator and the folder it is shut into: its program, its libraries, its firmware, no more.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox.images import rootfs

PROGRAM = "qemu-system-x86_64"
INSTALL = "apt-get install -y --no-install-recommends qemu-system-x86 qemu-utils seabios"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_VERSION = 2
_MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")
# Parts of the emulator that are loaded when they are needed, and the firmware of both machines.
_PARTS = ("accel-tcg-*.so", "accel-qtest-*.so")
_FIRMWARE = (
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "vgabios-stdvga.bin",
)
_FIRMWARE_FOLDERS = ("/usr/share/qemu", "/usr/share/seabios")


@dataclass(frozen=True, slots=True)
class Emulator:
    """`tree`: the folder that becomes its root; `version`: what tells one build from another."""

    tree: Path
    version: str


def program() -> str | None:
    """Return the path of the emulator, None where it is not installed."""
    return shutil.which(PROGRAM, path=_PATH)


def need_program() -> str:
    """Return the path of the emulator. Raises Unsupported with what to install."""
    found = program()
    if found is None:
        sudo = "" if os.geteuid() == 0 else "sudo "
        raise Unsupported(f"virtual machines need QEMU, which is not installed: `{sudo}{INSTALL}`")
    return found


@lru_cache(maxsize=4)
def find(cache: Path) -> Emulator:
    """Return the emulator with its folder, which is made on first use. Raises SandboxError."""
    source = Path(need_program())
    parts = sorted(path for pattern in _PARTS for path in _MODULES.glob(pattern))
    digest = hashlib.blake2b(digest_size=10)
    for path in (source, *parts):
        found = path.stat()
        digest.update(f"{_VERSION} {path} {found.st_size} {found.st_mtime_ns}\n".encode())
    version = digest.hexdigest()
    tree = cache / "vm" / f"emulator-{version}"
    if tree.is_dir():
        return Emulator(tree, version)
    try:
        tree.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        work = Path(tempfile.mkdtemp(prefix=".emulator-", dir=tree.parent))
    except OSError as error:
        raise SandboxError(
            f"the emulator cannot be copied to {tree.parent} ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can be written to"
        ) from error
    try:
        _fill(work, source, parts)
        work.chmod(0o755)
        work.rename(tree)
    except (OSError, subprocess.SubprocessError) as error:
        if not tree.is_dir():
            raise SandboxError(f"the emulator cannot be copied to {tree} ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Emulator(tree, version)


def _fill(root: Path, source: Path, parts: list[Path]) -> None:
    # setpriv turns root into the machine's own user, inside the folder and just before the start.
    for name in (source, Path(shutil.which("setpriv", path=_PATH) or "/usr/bin/setpriv")):
        _copy(root, name, f"usr/bin/{name.name}")
        _copy_libraries(root, name)
    for path in parts:
        _copy(root, path, str(path).lstrip("/"))
        _copy_libraries(root, path)
    for name in _FIRMWARE:
        for folder in _FIRMWARE_FOLDERS:
            if (found := Path(folder, name)).exists():
                _copy(root, found, f"usr/share/qemu/{name}")
                break
    if not (root / "usr/share/qemu/bios-256k.bin").exists():
        raise SandboxError(f"the emulator has no firmware: `{INSTALL}`")
    for name, target in {"lib": "usr/lib", "lib64": "usr/lib64"}.items():
        (root / name).symlink_to(target)
    for path, folders, files in os.walk(root):
        for name in folders:
            (Path(path) / name).chmod(0o755)
        for name in files:
            if not (file := Path(path) / name).is_symlink():
                file.chmod(0o755)


def _copy(root: Path, source: Path, target: str) -> None:
    parts = Path(target).parts
    place = root.joinpath(*(("usr", *parts) if parts[0] in ("lib", "lib64") else parts))
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(os.path.realpath(source), place)


def _copy_libraries(root: Path, program: Path) -> None:
    loader = rootfs.interpreter_of(Path(os.path.realpath(need_program())))
    if loader is None:
        return
    for place, file in rootfs.libraries_of(program, loader).items():
        _copy(root, Path(file), place.lstrip("/"))

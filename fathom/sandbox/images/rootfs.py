"""The sandbox's own root filesystem, made of programs and libraries copied from this machine.

An image is built once, without the network, into the cache folder under the digest of what goes in.
It is renamed into place whole, so two processes that build the same one at the same time are safe.

Paper: none (the report's layered images are not part of this thin form).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from fathom.errors import SandboxError

_VERSION = 3
REQUIRED = "bash cat chmod cp echo env false ls mkdir mv rm sleep true sh".split()
WANTED = (
    "[ awk b2sum base32 base64 basename bc bzip2 cksum cmp column comm csplit cut date dd df "
    "diff diff3 dircolors dirname du egrep expand expr factor fgrep find flock fmt fold "
    "free getopt grep groups gunzip gzip head hexdump hostname id install join jq kill less "
    "link ln logname m4 make md5sum mkfifo mktemp more nice nl nohup nproc numfmt od "
    "paste patch pgrep pkill pr printenv printf ps pwd readlink realpath rev rmdir sdiff sed "
    "seq setsid sha1sum sha256sum sha512sum shred shuf sort split stat stdbuf sum sync tac tail "
    "tar tee test time timeout top touch tr tree truncate tsort tty uname unexpand uniq unlink "
    "uptime users vdir wc which who whoami xargs xxd xz yes zcat"
).split()
_BUILDING = ".building-"
# Whoever uses an image locks this file of it.
_LOCKED = "etc/passwd"
_ABANDONED = 3600.0
_SEARCH = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")
_LINKS = {"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"}
_FOLDERS = ("usr/bin usr/lib usr/lib64 etc work tmp dev proc run var home root sys").split()
_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/work:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "resolv.conf": "",
    "hostname": "sandbox\n",
}


def find_program(name: str) -> Path | None:
    """Return the host's program `name` from the system folders, or None."""
    for folder in _SEARCH:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def interpreter_of(path: Path) -> str | None:
    """Return the dynamic loader that an ELF file names; None for scripts and static programs."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            return None
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(offset)
        table = file.read(size * count)
        for start in range(0, size * count, size):
            kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", table, start)
            if kind == 3:
                file.seek(at)
                return file.read(length).rstrip(b"\0").decode()
    return None


def libraries_of(path: Path, loader: str) -> dict[str, str]:
    """Ask the loader which libraries `path` needs: place in the image -> file of the host.

    Raises SandboxError when one is missing. Only ever given the host's own programs.
    """
    done = subprocess.run(
        [loader, "--list", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        env={"LC_ALL": "C"},
        check=False,
    )
    if done.returncode:
        raise SandboxError(f"{path} cannot be put in an image: {done.stderr.strip()}")
    found = {loader: os.path.realpath(loader)}
    for line in done.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        target = (rest if arrow else name).rpartition(" (")[0]
        if "not found" in line:
            raise SandboxError(f"{path} cannot be put in an image: {line.strip()}")
        if target.startswith("/"):
            found[target] = os.path.realpath(target)
    return found


def _programs() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in [*REQUIRED, *WANTED]:
        if name == "sh":
            continue
        path = find_program(name)
        if path is not None:
            found[name] = path
        elif name in REQUIRED:
            raise SandboxError(f"this machine has no {name}: install coreutils and bash")
    return found


def _python() -> tuple[Path, Path]:
    """Return the host's own python3 and its standard library."""
    path = find_program("python3")
    if path is None:
        raise SandboxError('image "python" needs the system\'s python3: apt-get install -y python3')
    code = "import sysconfig; print(sysconfig.get_paths()['stdlib'])"
    done = subprocess.run(
        [str(path), "-I", "-S", "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    library = Path(done.stdout.strip())
    if done.returncode or not (library / "os.py").is_file():
        raise SandboxError(f"{path} does not tell where its standard library is")
    return path, library


def _fingerprint(image: str, paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps([_VERSION, image, _ETC, sorted(_LINKS.items()), _FOLDERS]).encode())
    for path in paths:
        real = Path(os.path.realpath(path))
        if real.exists():
            found = real.stat()
            digest.update(f"{path}\0{real}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _place(root: Path, target: str) -> Path:
    """Return where `target` lies under `root`, through the image's own folder links."""
    parts = Path(target.lstrip("/")).parts
    first = _LINKS.get(parts[0], parts[0])
    rest = parts[1:]
    if (first, rest[:1]) == ("usr", ("sbin",)):
        rest = ("bin", *rest[1:])
    return root.joinpath(first, *rest)


def _copy(source: str | Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(os.path.realpath(source), target)
    target.chmod(0o755)


def _copy_program(root: Path, source: Path, target: str) -> None:
    _copy(source, _place(root, target))
    real = Path(os.path.realpath(source))
    if loader := interpreter_of(real):
        for place, file in libraries_of(real, loader).items():
            _copy(file, _place(root, place))


def _copy_python(root: Path) -> None:
    program, library = _python()
    _copy_program(root, program, "/usr/bin/python3")
    (root / "usr/bin/python").symlink_to("python3")
    loader = interpreter_of(Path(os.path.realpath(program)))
    skip = shutil.ignore_patterns(
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "idlelib",
        "ensurepip",
        "config-*",
        "lib2to3",
        "tkinter",
        "turtledemo",
    )
    target = _place(root, str(library))
    shutil.copytree(library, target, ignore=skip, symlinks=False, ignore_dangling_symlinks=True)
    for module in sorted(target.rglob("*.so")):
        if loader:
            source = library / module.relative_to(target)
            try:
                needed = libraries_of(source, loader)
            except SandboxError:
                module.unlink()
                continue
            for place, file in needed.items():
                _copy(file, _place(root, place))


def _fill(root: Path, image: str, programs: dict[str, Path]) -> None:
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    (root / "usr/sbin").symlink_to("bin")
    for name, path in programs.items():
        _copy_program(root, path, f"/usr/bin/{name}")
    (root / "usr/bin/sh").symlink_to("bash")
    locale = Path("/usr/lib/locale/C.utf8")
    if locale.is_dir():
        shutil.copytree(locale, root / "usr/lib/locale/C.utf8")
    if image == "python":
        _copy_python(root)
    for name, text in _ETC.items():
        (root / "etc" / name).write_text(text)
        (root / "etc" / name).chmod(0o644)
    (root / "var/tmp").symlink_to("/tmp")
    for path, folders, _ in os.walk(root):
        for folder in folders:
            if not (Path(path) / folder).is_symlink():
                (Path(path) / folder).chmod(0o755)
    root.chmod(0o755)
    # runc gives a mount in memory the mode of the folder below it.
    (root / "tmp").chmod(0o1777)


# (image, cache folder) -> what this machine looked like, and the image that was right for it.
_known: dict[tuple[str, Path], tuple[tuple[int, ...], Path]] = {}


def _machine() -> tuple[int, ...]:
    """Return what changes when programs or libraries of this machine do.

    Package managers put files in place by renaming them, which changes the folder's time.
    """
    stamps: list[int] = []
    for path in (*_SEARCH, "/etc/alternatives", "/etc/ld.so.cache"):
        with contextlib.suppress(OSError):
            stamps.append(os.stat(path).st_mtime_ns)
    return tuple(stamps)


def build(image: str, cache: Path) -> Path:
    """Return the folder of the image `image` ("base" or "python"), building it when it is missing.

    Raises SandboxError.
    """
    stamp = _machine()
    before, folder = _known.get((image, cache), ((), cache))
    if stamp == before and folder.is_dir():
        return folder
    folder = _build(image, cache)
    _known[image, cache] = (stamp, folder)
    return folder


def _build(image: str, cache: Path) -> Path:
    programs = _programs()
    sources = [*programs.values(), Path("/etc/ld.so.cache")]
    if image == "python":
        program, library = _python()
        sources += [program, library, library / "os.py"]
    images = cache / "images"
    final = images / f"{image}-{_fingerprint(image, sources)}"
    if final.is_dir():
        return final
    work: Path | None = None
    try:
        images.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=images))
        _fill(work, image, programs)
        work.rename(final)
    except OSError as error:
        # Losing the race to another builder is the expected way to fail here.
        if not final.is_dir():
            raise SandboxError(
                f"the image {image} cannot be built in {images} ({error}): free some space or set "
                "XDG_CACHE_HOME to a folder that can be written to"
            ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    _remove_old(images, image, final.name)
    return final


def hold(folder: Path) -> int:
    """Keep an image from being removed for as long as the returned descriptor is open anywhere.

    It leads to one file alone, so that a process inside the sandbox may have a copy.
    Raises SandboxError when the image was removed meanwhile.
    """
    try:
        fd = os.open(folder / _LOCKED, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"the image {folder} cannot be used ({error}): try again") from error
    fcntl.flock(fd, fcntl.LOCK_SH)
    if not os.fstat(fd).st_nlink:
        os.close(fd)
        raise SandboxError(f"the image {folder} was removed just now: try again")
    return fd


def _remove_old(images: Path, image: str, current: str) -> None:
    """Remove images that an update of this machine replaced, and what killed builders left."""
    for entry in images.iterdir():
        with contextlib.suppress(OSError):
            abandoned = entry.name.startswith(_BUILDING) and (
                time.time() - entry.stat().st_mtime > _ABANDONED
            )
            replaced = entry.name.startswith(f"{image}-") and entry.name != current
            if not (abandoned or replaced):
                continue
            with contextlib.ExitStack() as stack:
                if replaced:
                    # Refused while a sandbox runs on it; an older release locks the folder.
                    for path in (entry, entry / _LOCKED):
                        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        stack.callback(os.close, fd)
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    entry = entry.rename(images / f"{_BUILDING}{entry.name}")
                shutil.rmtree(entry, ignore_errors=True)

"""Layers of Debian packages: a whole system, or a toolkit of packages on top of one.

A system is made by mmdebstrap, which runs the packages' own scripts. A toolkit is the packages'
files alone, unpacked without running anything, so it is the same on every machine; what a package
would set up when it is installed is not done.

Paper: §5.2.5 (base layers and toolkit layers).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from fathom.errors import MissingDependency
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import lookup, tarball, tree
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import BuildFailed, ImageMissing
from fathom.sandbox.images.oci import own_architecture
from fathom.sandbox.images.packed import Reader
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tarball import Limits
from fathom.sandbox.images.types import Image, LayerRef, RunConfig, check_new_name

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIMITS = Limits(size=32 << 30)
# Written while installing, different each time, and no part of what was installed.
_NOISE = (
    "/var/log/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/lib/apt/lists/* "
    "/var/cache/debconf/*-old /var/lib/dpkg/*-old /etc/machine-id /run/* /tmp/*"
).split()


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise MissingDependency(f"{name} is not installed: `apt-get install -y {package}`")
    return found


def system(
    store: Store,
    name: str | None,
    *,
    suite: str = "bookworm",
    packages: Sequence[str] = (),
    mirrors: Sequence[str] = (),
    variant: str = "minbase",
    epoch: int = 0,
    timeout: float = 1800.0,
) -> Image:
    """Make an image of a Debian system and call it `name`; None leaves that to the caller.

    `suite`, `variant`, `mirrors` and `packages` are mmdebstrap's; without `mirrors` it takes its
    own. Every file has the time `epoch`, so the same packages give the same digest.
    Raises MissingDependency, BuildFailed with what mmdebstrap said last, StoreFull.
    """
    if name is not None:
        check_new_name(name)
    argv = [_program("mmdebstrap", "mmdebstrap"), "--quiet", "--format=tar", f"--variant={variant}"]
    argv += [f"--include={','.join(packages)}"] if packages else []
    argv += [f"--customize-hook=rm -rf {' '.join(f'$1{path}' for path in _NOISE)}"]
    argv += [suite, "-", *mirrors]
    environment = {"PATH": _PATH, "SOURCE_DATE_EPOCH": str(epoch), "HOME": "/nonexistent"}
    with store.making(f"the system {suite} cannot be made") as work:
        with (work / "data").open("wb") as out, (work / "log").open("w+b") as log:
            blob = BlobWriter(out)
            with subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, "TMPDIR": str(work)},
                cwd="/",
            ) as process:
                assert process.stdout is not None
                try:
                    stream = Reader(cast("BinaryIO", process.stdout), _LIMITS.size)
                    root = tarball.from_tar(stream, blob, _LIMITS)
                    stream.drain()
                    process.wait(timeout)
                except BaseException:
                    process.kill()
                    if process.wait():
                        raise BuildFailed(f"mmdebstrap failed: {_last(log)}") from None
                    raise
            if process.returncode:
                raise BuildFailed(f"mmdebstrap ended with {process.returncode}: {_last(log)}")
        _settle_times(root, epoch)
        layer = layering.publish(store, root, work / "data", blob)
    run = RunConfig(env=(("PATH", _PATH),), command=("/bin/bash",))
    image = Image(layers=(layer.digest,), run=run, architecture=own_architecture())
    store.put_image(image, name)
    return image


def _last(log: BinaryIO) -> str:
    log.seek(0)
    return log.read().decode(errors="replace").strip()[-1500:]


def _settle_times(root: tree.Node, epoch: int) -> None:
    for _, node in tree.walk(root):
        node.mtime = epoch


def unpack_packages(store: Store, files: Sequence[Path]) -> LayerRef:
    """Make one layer of the files of Debian packages, later ones over earlier ones.

    Nothing of the packages is run. The same packages in the same order give the same digest.
    Raises MissingDependency, BuildFailed, ArchiveRefused.
    """
    program = _program("dpkg-deb", "dpkg")
    with store.making("the packages cannot be unpacked") as work:
        root = tree.folder()
        with (work / "data").open("wb") as out:
            blob = BlobWriter(out)
            for file in files:
                one = _files_of(program, file, blob)
                root = tree.merge(root, one, bottom=True)
        return layering.publish(store, root, work / "data", blob)


def _files_of(program: str, file: Path, blob: BlobWriter) -> tree.Node:
    argv = [program, "--fsys-tarfile", str(file)]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": _PATH, "LC_ALL": "C"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            stream = Reader(cast("BinaryIO", process.stdout), _LIMITS.size)
            found = tarball.from_tar(stream, blob, _LIMITS)
            stream.drain()
        except BaseException:
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()
            if "dpkg-deb: error" in said:
                raise BuildFailed(f"{file} is not a Debian package: {said[-500:]}") from None
            raise
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise BuildFailed(f"{file} is not a Debian package: {said[-500:]}")
    return found


def download(
    packages: Sequence[str],
    folder: Path,
    status: bytes = b"",
    *,
    lists: Path | None = None,
    timeout: float = 900.0,
) -> list[Path]:
    """Fetch packages and what they depend on into `folder`; return the files, sorted by name.

    `status`: dpkg's record of what is installed already, for which nothing is fetched. apt's lists
    of this machine say which versions there are; apt proves signatures and digests. `lists`: a
    folder for lists that are fetched first, where this machine's may be missing or old.
    Raises MissingDependency, BuildFailed.
    """
    program = _program("apt-get", "apt")
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "status").write_bytes(status)
    options = {
        "Dir::State::status": str(folder / "status"),
        "Dir::Cache::archives": str(folder),
        "Dir::Cache::pkgcache": str(folder / "pkgcache.bin"),
        "Dir::Cache::srcpkgcache": str(folder / "srcpkgcache.bin"),
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "APT::Install-Recommends": "0",
        "APT::Get::Show-Progress": "0",
    }
    if lists is not None:
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options["Dir::State::lists"] = str(lists)
    argv = [program, "--quiet", "--yes", *(f"-o{key}={value}" for key, value in options.items())]

    def apt(*words: str) -> None:
        done = subprocess.run(
            [*argv, *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
        if done.returncode:
            said = done.stderr.strip()[-1500:]
            raise BuildFailed(f"apt-get could not fetch {' '.join(packages)}: {said}")

    if lists is not None:
        apt("update")
    apt("--download-only", "install", "--", *packages)
    return sorted(folder.glob("*.deb"))


def toolkit(store: Store, name: str, packages: Sequence[str], *, base: str | None = None) -> Image:
    """Make an image of the files of packages, for use on top of `base`; call it `name`.

    What the image `base` has installed is left out. Raises as `download` and `unpack_packages`.
    """
    check_new_name(name)
    status = b""
    if base is not None:
        try:
            status = lookup.read_file(store, store.resolve(base), "/var/lib/dpkg/status", 64 << 20)
        except ImageMissing:
            raise BuildFailed(
                f"{base} is not a Debian system: it has no record of packages"
            ) from None
    with store.making("the packages cannot be fetched") as work:
        layer = unpack_packages(store, download(packages, work / "packages", status))
    image = Image(layers=(layer.digest,), architecture=own_architecture())
    store.put_image(image, name)
    return image

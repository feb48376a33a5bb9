"""The mounts that layers need, each with its way back.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fathom.errors import Unsupported
from fathom.sandbox import syscalls
from fathom.sandbox.images import ondemand
from fathom.sandbox.images.errors import ImageError
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import Layer

_MS_RDONLY = 1
_OPTION_LIMIT = 4096 - 1
_ONE_OPTION_LIMIT = 255
_TIMEOUT = 30.0


@dataclass(slots=True, kw_only=True)
class Mounted:
    """Something mounted at `target`, the folders made for it, and what to close with it."""

    target: Path
    made: list[Path] = field(default_factory=list[Path])
    also: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    on_demand: bool = False

    def close(self) -> None:
        """Unmount and remove the folders made for it."""
        with contextlib.suppress(OSError):
            syscalls.unmount(str(self.target))
        for step in self.also:
            step()
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(folder: Path) -> list[Path]:
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError:
        return []
    return [folder]


def mount_layer(store: Store, layer: Layer, target: Path, *, loop: bool = False) -> Mounted:
    """Mount a layer read-only at `target`. Raises OSError, ImageError, Unsupported."""
    if any(character in str(store.folder) for character in ",\\"):
        raise ImageError(f"the folder {store.folder} has a comma or backslash in its name")
    mounted = Mounted(target=target, made=_make(target))
    try:
        sources = [store.path(layer.meta)]
        sources += _data_files(store, layer, mounted)
        devices = [str(path) for path in sources]
        if loop:
            for place, path in enumerate(sources):
                devices[place] = _attach(path)
                mounted.also.append(_detacher(devices[place]))
        options = ",".join(f"device={device}" for device in devices[1:])
        if len(options) <= _OPTION_LIMIT:
            flags = _MS_RDONLY | syscalls.MS_NODEV
            syscalls.mount(devices[0], str(target), "erofs", flags, options or None)
        elif max(map(len, devices)) > _ONE_OPTION_LIMIT:
            raise ImageError(
                f"the layer has {len(devices) - 1} data blobs and the store's folder "
                f"{store.folder} has a long name: together the kernel takes neither; move the store"
            )
        else:
            syscalls.mount_read_only(
                "erofs",
                [("source", devices[0]), *(("device", device) for device in devices[1:])],
                str(target),
            )
        if mounted.on_demand:
            # From here on the layer alone keeps the server of its contents alive.
            mounted.also.pop(0)()
    except BaseException:
        for step in mounted.also:
            step()
        for folder in mounted.made:
            folder.rmdir()
        raise
    return mounted


def _data_files(store: Store, layer: Layer, mounted: Mounted) -> list[Path]:
    """Return the files of a layer's blobs, served on demand where they are not here.

    The first step to take back is then the server's own mount.
    """
    absent = [blob for blob in layer.data if not store.has_data(blob.digest)]
    served = mounted.target.with_name(f"{mounted.target.name}.data")
    if absent:
        made = _make(served)
        try:
            ondemand.serve_blobs(store, absent, served)
        except BaseException:
            for folder in made:
                folder.rmdir()
            raise
        mounted.on_demand = True
        mounted.also.append(Mounted(target=served, made=made).close)
    return [
        served / blob.digest[7:] if blob in absent else store.data_path(blob.digest)
        for blob in layer.data
    ]


def overlay(
    target: Path,
    layers: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    *,
    user_attributes: bool = False,
) -> Mounted:
    """Join `layers`, the lowest first, at `target`. Raises OSError."""
    lower = ":".join(_escape(path) for path in reversed(layers))
    if upper is None and len(layers) == 1:
        # The kernel wants two layers at least, and the target is an empty folder.
        lower += f":{_escape(target)}"
    options = [f"lowerdir={lower}"]
    if upper is not None:
        options += [f"upperdir={_escape(upper)}", f"workdir={_escape(work or upper)}"]
    # What these would write into the upper folder has no meaning on another machine.
    options += ["redirect_dir=nofollow", "metacopy=off", "index=off", "xino=off"]
    if user_attributes:
        options.append("userxattr")
        options.remove("redirect_dir=nofollow")
        options.remove("metacopy=off")
    text = ",".join(options)
    if len(text) > _OPTION_LIMIT:
        raise OSError(errno.E2BIG, "the stack of layers has too long names", str(target))
    made = _make(target)
    try:
        syscalls.mount("overlay", str(target), "overlay", syscalls.MS_NODEV, text)
    except BaseException:
        for folder in made:
            folder.rmdir()
        raise
    return Mounted(target=target, made=made)


def fuse_overlay(
    program: str, target: Path, layers: Sequence[Path], upper: Path | None, work: Path | None
) -> Mounted:
    """Join `layers` at `target` by fuse-overlayfs. Raises Unsupported."""
    options = "lowerdir=" + ":".join(str(path) for path in reversed(layers))
    if upper is not None:
        options += f",upperdir={upper},workdir={work}"
    made = _make(target)
    done = subprocess.run(
        [program, "-o", options, str(target)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode:
        for folder in made:
            folder.rmdir()
        raise Unsupported(f"fuse-overlayfs does not work here: {done.stderr.strip()[-300:]}")

    mounted = Mounted(target=target, made=made)
    if os.geteuid() != 0:
        mounted.also.append(lambda: _fusermount(target))
    return mounted


def _fusermount(target: Path) -> None:
    subprocess.run(
        ["fusermount3", "-u", str(target)], capture_output=True, timeout=_TIMEOUT, check=False
    )


def bind_mapped(source: Path, target: Path, userns: int) -> Mounted:
    """Show `source` at `target` with owners translated by a user namespace. Raises Unsupported."""
    made = _make(target)
    try:
        syscalls.bind_mapped(str(source), str(target), userns)
    except OSError as error:
        for folder in made:
            folder.rmdir()
        raise Unsupported(
            f"the owners of {source} cannot be translated ({error.strerror}): Linux 5.19 or newer "
            "and a file system that can do it are needed"
        ) from error
    return Mounted(target=target, made=made)


def _escape(path: Path) -> str:
    text = str(path)
    for character in "\\:,":
        text = text.replace(character, f"\\{character}")
    return text


def _attach(path: Path) -> str:
    done = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(path)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise Unsupported(f"no loop device for {path}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def _detacher(device: str) -> Callable[[], None]:
    def detach() -> None:
        subprocess.run(
            ["losetup", "--detach", device], capture_output=True, timeout=_TIMEOUT, check=False
        )

    return detach

"""What this machine can do for images, proven by doing it with a small layer.

Paper: none (machine facts).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fathom.errors import FathomError
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images.remote import attach, push
from fathom.sandbox.images.source import is_root
from fathom.sandbox.images.stack import LayerMode, compose
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import Image

_TEXT = "fathom"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What recipes, archives and disks call, with the Debian package that brings it.
PROGRAMS = {
    "crun": "crun",
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "losetup": "mount",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """One thing that was tried. `problem` says why it does not work here, None where it does."""

    name: str
    problem: str | None

    @property
    def works(self) -> bool:
        """Whether it worked."""
        return self.problem is None


def examine(folder: Path | None = None) -> list[Ability]:
    """Try every way to mount layers, writing over them and reading on demand. Never raises.

    `folder`: where to try, a temporary folder when not given.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        with Store(place / "store", durable=False) as store:
            (place / "a").mkdir()
            (place / "a/file").write_text(_TEXT)
            image = Image(layers=(layering.pack_folder(store, place / "a").digest,))
            store.put_image(image)
            modes: tuple[LayerMode, ...] = ("erofs", "loop", "folders")
            tried: dict[str, Callable[[], None]] = {
                f"layers: {mode}": lambda mode=mode: _read(store, image, place, mode)
                for mode in modes
            }
            tried["writes over layers"] = lambda: _write(store, image, place)
            tried["contents on demand"] = lambda: _on_demand(store, image, place)
            found = [Ability(name=what, problem=_try(step)) for what, step in tried.items()]
    for program, package in PROGRAMS.items():
        here = shutil.which(program, path=_PATH) is not None
        problem = None if here else f"not installed: apt-get install -y {package}"
        found.append(Ability(name=f"program: {program}", problem=problem))
    return found


def _try(step: Callable[[], None]) -> str | None:
    try:
        step()
    except (FathomError, OSError, ValueError) as error:
        return str(error)
    return None


def _fresh(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place))


def _expect(root: Path) -> None:
    if (root / "file").read_text() != _TEXT:
        raise ValueError("what was read is not what was packed")


def _read(store: Store, image: Image, place: Path, mode: LayerMode) -> None:
    with compose(store, image, _fresh(place), mode=mode) as stack:
        _expect(stack.root)


def _write(store: Store, image: Image, place: Path) -> None:
    upper = _fresh(place) / "upper"
    upper.mkdir()
    with compose(store, image, _fresh(place), upper=upper) as stack:
        (stack.root / "file").unlink()
        (stack.root / "new").write_text(_TEXT)
    packed = store.tree(layering.pack_diff(store, upper).digest)
    if not packed.children[b"file"].is_whiteout or packed.children[b"new"].size != len(_TEXT):
        raise ValueError("the overlay does not write what it should")


def _on_demand(store: Store, image: Image, place: Path) -> None:
    origin = place / "origin"
    push(store, image, str(origin), "probe")
    with Store(place / "other", durable=False) as other:
        there = attach(other, str(origin), "probe")
        folder = _fresh(place)
        mode: LayerMode = "erofs" if is_root() else "folders"
        with compose(other, replace(there), folder, mode=mode) as stack:
            _expect(stack.root)
            if not stack.caps.on_demand:
                raise ValueError("contents are fetched before they are needed, not on demand")

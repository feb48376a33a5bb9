"""Without root: `nobody` makes, composes, packs and builds, and is told what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
NOBODY = 65534
BECOME = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env")

PREPARE = """
import json, os, sys
from pathlib import Path
from fathom.errors import FathomError
from fathom.sandbox.images import *
from fathom.sandbox.images.care import check
here = Path(sys.argv[1])
store = Store(here / "store", durable=False)
def place(name):
    (here / name).mkdir(exist_ok=True)
    return here / name
said = {}
def names(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))
"""

OUTSIDE = (
    PREPARE
    + """
folder = place("a")
(folder / "d").mkdir()
for name in ("d/one", "d/two", "gone"):
    (folder / name).write_text(name)
(folder / "d/two").chmod(0o4755)
image = image_of_folder(store, folder, "one")
said["owner"] = store.tree(image.layers[0]).children[b"gone"].uid
with compose(store, image, place("m1")) as stack:
    said["single"] = [stack.mode, stack.join, names(stack.root), stack.caps.rootless,
                      stack.caps.owners, oct((stack.root / "d/two").stat().st_mode)]
for mode in ("erofs", "loop"):
    try:
        compose(store, image, place("m2"), mode=mode)
    except FathomError as error:
        said[mode] = error.code
try:
    compose(store, image, place("m3"), upper=place("u0"))
except FathomError as error:
    said["upper"] = [error.code, str(error)]
from fathom.sandbox.images.recipe import build
place("c")
(here / "c/x").write_text("x")
built = build(store, "FROM one\\nCOPY x /d/\\nWORKDIR /w", here / "c", "built")
with compose(store, built, place("m4")) as stack:
    said["joined"] = [stack.mode, stack.join, names(stack.root)]
try:
    build(store, "FROM one\\nRUN true", here / "c", "never")
except FathomError as error:
    said["run"] = [error.code, str(error)]
said["check"] = len(check(store))
print(json.dumps(said))
"""
)

INSIDE = (
    PREPARE
    + """
import shutil
image = store.resolve("built")
upper = place("u")
with compose(store, image, place("n1"), upper=upper) as stack:
    said["mode"] = [stack.mode, stack.join, stack.caps.writable, stack.caps.owners]
    (stack.root / "gone").unlink()
    shutil.rmtree(stack.root / "d")
    (stack.root / "d").mkdir()
    (stack.root / "d/new").write_text("new")
    expected = names(stack.root)
    later = snapshot(store, image, upper, name="later")
with compose(store, later, place("n2"), upper=place("u2")) as stack:
    said["fork"] = names(stack.root) == expected
tree = store.tree(later.layers[-1])
said["packed"] = [tree.children[b"gone"].is_whiteout, tree.children[b"d"].is_opaque,
                  tree.children[b"d"].children[b"new"].uid]
said["names"] = expected
print(json.dumps(said))
"""
)


@pytest.fixture
def home(need_root: None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fathom-nobody-", dir="/tmp"))
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def run(home: Path, code: str, *before: str) -> dict:
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
    }
    for interpreter in (sys.executable, "/usr/bin/python3"):
        probe = [*BECOME, interpreter, "-c", "import zstandard, fathom.sandbox.images"]
        if (
            subprocess.run(
                probe, env=environment, cwd=home, capture_output=True, check=False
            ).returncode
            == 0
        ):
            break
    else:
        pytest.skip("no interpreter with the packages can be run by nobody")
    done = subprocess.run(
        [*BECOME, *before, interpreter, "-c", code, str(home)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if before and "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_nobody_can_do(home: Path):
    said = run(home, OUTSIDE)
    assert said["owner"] == 0
    assert said["single"] == [
        "folders",
        "single",
        ["d", "d/one", "d/two", "gone"],
        True,
        False,
        "0o100755",
    ]
    assert said["erofs"] == said["loop"] == "sandbox_unsupported"
    assert said["upper"][0] == "sandbox_unsupported"
    assert "enter a user namespace" in said["upper"][1]
    assert said["joined"] == ["folders", "joined", ["d", "d/one", "d/two", "d/x", "gone", "w"]]
    assert said["run"][0] == "sandbox_unsupported"
    assert "RUN needs root" in said["run"][1]
    assert said["check"] == 0
    inside = run(home, INSIDE, "unshare", "--user", "--map-root-user", "--mount")
    assert inside["mode"] == ["folders", "overlay", True, False]
    assert inside["names"] == ["d", "d/new", "w"]
    assert inside["fork"] is True
    assert inside["packed"] == [True, True, 0]


def test_fuse_overlayfs_where_it_works(need_root, tmp_path: Path, store, fill, monkeypatch):
    """Tried as root, who may use FUSE here; a user who may not mount is only pretended."""
    from fathom.sandbox.images import compose, image_of_folder, mounts, snapshot, stack
    from tests.sandbox.images.listing import listing

    if not shutil.which("fuse-overlayfs") or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("fuse-overlayfs cannot be used here")
    image = image_of_folder(store, fill(tmp_path / "a"), "one")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "mount: Operation not permitted")

    monkeypatch.setattr(mounts, "overlay", refuse)
    monkeypatch.setattr(stack, "is_root", lambda: False)
    for name in ("m", "u", "n", "u2"):
        (tmp_path / name).mkdir()
    with compose(store, image, tmp_path / "m", upper=tmp_path / "u", mode="folders") as one:
        assert one.join == "fuse-overlayfs"
        assert listing(one.root) == listing(tmp_path / "a")
        (one.root / "big").unlink()
        shutil.rmtree(one.root / "many")
        (one.root / "new").write_text("new")
        expected = listing(one.root)
        later = snapshot(store, image, tmp_path / "u")
    with compose(store, later, tmp_path / "n", upper=tmp_path / "u2", mode="folders") as one:
        assert listing(one.root) == expected

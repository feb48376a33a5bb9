"""Layers: the kernel and erofs-utils read what we write, the same input gives the same digest."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.errors import Unsupported
from fathom.sandbox.images import (
    Env,
    Image,
    ImageError,
    ImageMissing,
    ImageTooLarge,
    Owners,
    RunConfig,
    Store,
    compose,
    erofs,
    erofs_read,
    flatten,
    flatten_small,
    image_of_folder,
    pack_diff,
    pack_folder,
    snapshot,
    tree,
)
from fathom.sandbox.images.care import check
from tests.sandbox.images.listing import listing

Fill = Callable[[Path], Path]
MODES = ["erofs", "loop", "folders"]


def place(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_holes_are_neither_read_nor_written(store: Store, tmp_path: Path):
    folder = place(tmp_path, "a")
    size, marks = 256 << 20, (0, 100 << 20, (200 << 20) + 12_345)
    with (folder / "sparse").open("wb") as file:
        file.truncate(size)
        for at in marks:
            os.pwrite(file.fileno(), b"here", at)
    (folder / "small").write_bytes(bytes(700_000))
    for name in ("sparse", "small"):
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))
    os.utime(folder, (1_600_000_000, 1_600_000_000))
    layer = pack_folder(store, folder)
    (blob,) = store.layer(layer.digest).data
    held = store.data_path(blob.digest).stat()
    assert held.st_size == blob.size >= size
    assert held.st_blocks * 512 < 4 << 20
    assert check(store) == []
    # Zeros that were written give the same layer, and lie in holes as well.
    dense = bytearray(size)
    for at in marks:
        dense[at : at + 4] = b"here"
    (folder / "sparse").write_bytes(dense)
    os.utime(folder / "sparse", (1_600_000_000, 1_600_000_000))
    with Store(tmp_path / "other", durable=False) as other:
        assert pack_folder(other, folder).digest == layer.digest
        assert other.data_path(blob.digest).stat().st_blocks * 512 < 4 << 20
    # And they come back.
    image = Image(layers=(layer.digest,), architecture="amd64")
    if os.geteuid() == 0:
        with (
            compose(store, image, place(tmp_path, "m")) as stack,
            (stack.root / "sparse").open("rb") as shown,
        ):
            assert hashlib.sha256(shown.read()).digest() == hashlib.sha256(dense).digest()


def test_a_file_of_nothing_is_refused(store: Store, tmp_path: Path):
    folder = place(tmp_path, "a")
    with (folder / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageTooLarge, match="/x has 1099511627776 bytes"):
        pack_folder(store, folder)
    os.truncate(folder / "x", 10 << 20)
    with pytest.raises(ImageTooLarge, match="holes included"):
        pack_diff(store, folder, limit=(10 << 20) - 1)
    (folder / "y").hardlink_to(folder / "x")  # counts once
    assert pack_diff(store, folder, limit=10 << 20)
    assert list((store.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_shows_what_was_packed(
    need_root, store: Store, tmp_path: Path, fill: Fill, mode
):
    folder = fill(tmp_path / "a")
    os.chown(folder / "empty", 70_000, 12)
    image = image_of_folder(store, folder, "one")
    with compose(store, image, place(tmp_path, "m"), mode=mode) as stack:
        assert (stack.mode, stack.join, stack.upper) == (mode, "single", None)
        assert listing(stack.root) == listing(folder)
        with pytest.raises(OSError, match="Read-only"):
            (stack.root / "new").touch() if mode != "folders" else _refuse()
    assert list((tmp_path / "m").iterdir()) == []


def _refuse() -> None:
    # An unpacked layer is a folder that only the overlay keeps from being written to.
    raise OSError("Read-only")


def test_erofs_utils_accepts_the_image(store: Store, tmp_path: Path, fill: Fill):
    if not shutil.which("fsck.erofs"):
        pytest.skip("erofs-utils is not installed")
    image = image_of_folder(store, fill(tmp_path / "a"), "one")
    layer = store.layer(image.layers[0])
    done = subprocess.run(
        [
            "fsck.erofs",
            f"--device={store.data_path(layer.data[0].digest)}",
            str(store.path(layer.meta)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_mkfs_erofs_writes_reads_the_same(tmp_path: Path, store: Store, fill: Fill):
    if not shutil.which("mkfs.erofs"):
        pytest.skip("erofs-utils is not installed")
    folder = fill(tmp_path / "a")
    subprocess.run(
        [
            "mkfs.erofs",
            "--quiet",
            "--chunksize=4194304",
            f"--blobdev={tmp_path / 'blob'}",
            str(tmp_path / "meta"),
            str(folder),
        ],
        check=True,
        capture_output=True,
    )
    theirs = erofs_read.read(
        (tmp_path / "meta").read_bytes(), [(tmp_path / "blob").stat().st_size + erofs.BLOCK]
    )
    ours = store.tree(pack_folder(store, folder).digest)

    def plain(root: tree.Node) -> list[tuple]:
        return [
            (p, n.mode, n.uid, n.gid, n.size, n.target, n.rdev, n.xattrs, sorted(n.children))
            for p, n in tree.walk(root)
        ]

    assert plain(theirs) == plain(ours)


def test_the_same_folder_gives_the_same_digest(tmp_path: Path, fill: Fill):
    folder = fill(tmp_path / "a")
    # Another order of creation, another disk layout, the same files.
    copy = tmp_path / "b"
    names = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    subprocess.run(["cp", "-a", str(folder), str(copy)], check=True)
    for name in random.Random(7).sample(names, 100):
        path = copy / name
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            content, about = path.read_bytes(), path.stat()
            path.unlink()
            path.write_bytes(content)
            path.chmod(about.st_mode)
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    for path in [copy, *copy.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            os.utime(path, (1_600_000_000, 1_600_000_000))
    digests = set()
    for number, source in enumerate((folder, copy)):
        with Store(tmp_path / f"store{number}", durable=False) as store:
            digests.add(pack_folder(store, source).digest)
    assert len(digests) == 1


def test_a_layer_holds_equal_small_files_once(store: Store, tmp_path: Path, fill: Fill):
    layer = store.layer(pack_folder(store, fill(tmp_path / "a")).digest)
    assert layer.data[0].size < 3_000_001 + 50_000 + 202 * 4096 + 2 * 4096


def test_writes_become_a_layer_and_a_layer_a_fork(
    need_root, store: Store, tmp_path: Path, fill: Fill
):
    image = image_of_folder(store, fill(tmp_path / "a"), "one")
    upper = place(tmp_path, "u")
    with compose(store, image, place(tmp_path, "m"), upper=upper) as stack:
        root = stack.root
        (root / "new").write_text("new")
        (root / "bin/tool").unlink()
        (root / "big").write_bytes(b"changed")
        shutil.rmtree(root / "many")
        (root / "many").mkdir()
        (root / "many/only").write_text("one")
        (root / "empty folder").rmdir()
        (root / "empty folder").write_text("a file now")
        os.setxattr(root / "new", "user.note", b"x")
        expected = listing(root)
        later = snapshot(store, image, upper, name="later")
        assert listing(root) == expected
    for number, mode in enumerate(MODES):
        with compose(store, later, place(tmp_path, f"n{number}"), mode=mode) as fork:
            assert fork.join == "overlay"
            assert listing(fork.root) == expected
    joined = flatten(store, later.layers, bottom=True)
    with compose(store, [joined.digest], place(tmp_path, "j")) as stack:
        assert stack.join == "single"
        assert listing(stack.root) == expected


def test_a_long_chain_is_joined_and_shows_the_same(
    need_root, store: Store, tmp_path: Path, fill: Fill
):
    """Random writes in a chain of seven forks, against a plain copy of every step."""
    chance = random.Random(3)
    image = image_of_folder(store, fill(tmp_path / "a"), "one")
    for step in range(7):
        upper = place(tmp_path, f"u{step}")
        with compose(store, image, place(tmp_path, f"m{step}"), upper=upper) as stack:
            _scribble(stack.root, chance, step)
            expected = listing(stack.root)
            image = snapshot(store, image, upper)
    assert len(image.layers) == 8
    for name, one in (
        ("all", image),
        ("small", flatten_small(store, image)),
        (
            "some",
            Image(
                layers=(
                    *image.layers[:5],
                    flatten(store, image.layers[5:9]).digest,
                    *image.layers[9:],
                )
            ),
        ),
    ):
        with compose(store, one, place(tmp_path, name)) as stack:
            assert listing(stack.root) == expected, name
    assert len(flatten_small(store, image).layers) == 2
    one = flatten(store, image.layers, bottom=True)
    assert not any(n.is_whiteout or n.is_opaque for _, n in tree.walk(store.tree(one.digest)))


def _scribble(root: Path, chance: random.Random, step: int) -> None:
    for _ in range(12):
        paths = sorted(p for p in root.rglob("*") if not p.is_symlink())
        path = chance.choice(paths)
        action = chance.randrange(5)
        if action == 0:
            (path if path.is_dir() else path.parent).joinpath(f"n{step}").write_text(str(step))
        elif action == 1 and path.is_dir():
            shutil.rmtree(path)
            if chance.random() < 0.5:
                path.mkdir()
                (path / f"fresh{step}").write_text("x")
            elif chance.random() < 0.5:
                path.write_text("was a folder")
        elif action == 2 and path.is_file():
            path.unlink()
            if chance.random() < 0.5:
                path.mkdir()
                (path / "inside").write_text("was a file")
        elif action == 3 and path.is_file():
            path.write_text(f"changed in {step}")
        elif action == 4:
            path.chmod(0o755 if path.is_dir() else 0o640)


def test_owners_of_a_sandbox_are_undone(need_root, store: Store, tmp_path: Path):
    upper = place(tmp_path, "u")
    for name, owner in (("root", 1000), ("user", 2000), ("stranger", 5)):
        (upper / name).touch()
        os.chown(upper / name, owner, owner)
    found = store.tree(pack_diff(store, upper, owners=Owners(base=1000, count=65536)).digest)
    assert {n: (c.uid, c.gid) for n, c in found.children.items()} == {
        b"root": (0, 0),
        b"user": (1000, 1000),
        b"stranger": (65534, 65534),
    }


def test_a_user_namespace_sees_its_own_owners(need_root, store: Store, tmp_path: Path, fill: Fill):
    from fathom.sandbox.images import step

    image = image_of_folder(store, fill(tmp_path / "a"), "one")
    base = step.IDS
    try:
        userns = step.mapping()
    except OSError as error:
        pytest.skip(f"no user namespace: {error}")
    upper = place(tmp_path, "u")
    try:
        stack = compose(store, image, place(tmp_path, "m"), upper=upper, userns=userns)
    finally:
        os.close(userns)
    with stack:
        assert (stack.root / "big").stat().st_uid == base
        child = os.fork()
        if child == 0:
            try:
                # The folders of pytest are closed to others.
                os.chdir(stack.root)
                os.setgroups([])
                os.setresgid(base, base, base)
                os.setresuid(base, base, base)
                Path("big").write_text("mine")
                Path("new").write_text("mine")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        later = snapshot(store, image, upper, owners=Owners(base=base, count=65536))
    with compose(store, later, place(tmp_path, "n")) as fork:
        assert (fork.root / "big").read_text() == "mine"
        assert {(fork.root / n).stat().st_uid for n in ("big", "new", "bin")} == {0}


def test_a_file_that_changes_while_it_is_packed(store: Store, tmp_path: Path, monkeypatch):
    from fathom.sandbox.images import source

    folder = place(tmp_path, "u")
    (folder / "growing").write_bytes(bytes(3 << 20))
    pieces = source._pieces

    def meddle(fd: int, size: int):
        for piece in pieces(fd, size):
            with (folder / "growing").open("r+b") as file:
                file.write(b"other")
            yield piece

    monkeypatch.setattr(source, "_pieces", meddle)
    with pytest.raises(ImageError, match="/growing changed while it was packed: freeze"):
        pack_diff(store, folder)
    assert list((store.folder / "tmp").iterdir()) == []


def test_what_no_layer_holds(need_root, store: Store, tmp_path: Path):
    folder = place(tmp_path, "a")
    os.mknod(folder / "disk", 0o600 | 0o060000, os.makedev(8, 0))
    with pytest.raises(ImageError, match="/disk is a device"):
        pack_folder(store, folder)
    (folder / "disk").unlink()
    os.mknod(folder / "gone", 0o020000, 0)
    with pytest.raises(ImageError, match="mark of a deleted file"):
        pack_folder(store, folder)
    assert store.tree(pack_diff(store, folder).digest).children[b"gone"].is_whiteout


def test_notes_of_the_overlay_do_not_get_into_a_layer(need_root, store: Store, tmp_path: Path):
    folder = place(tmp_path, "a")
    os.setxattr(folder, "trusted.overlay.origin", b"machine")
    os.setxattr(folder, "trusted.overlay.impure", b"y")
    assert store.tree(pack_diff(store, folder).digest).xattrs == {}
    os.setxattr(folder, "trusted.overlay.redirect", b"/elsewhere")
    with pytest.raises(ImageError, match="mount it with redirect_dir=nofollow"):
        pack_diff(store, folder)


def test_an_environment_is_its_parts_in_order(need_root, store: Store, tmp_path: Path):
    for name in ("base", "work", "tool"):
        folder = place(tmp_path, name)
        (folder / name).touch()
        (folder / "who").write_text(name)
        run = RunConfig(
            env=(("WHO", name), (name, "1")), command=("/run",) if name == "base" else ()
        )
        image_of_folder(store, folder, name, run=run)
    version = store.names()["tool"]
    image = store.environment(Env(base="base", workspace="work", toolkits=[f"tool@{version}"]))
    assert len(image.layers) == 3
    assert image.run.command == ("/run",)
    assert dict(image.run.env) == {"WHO": "tool", "base": "1", "work": "1", "tool": "1"}
    with compose(store, image, place(tmp_path, "m")) as stack:
        assert sorted(os.listdir(stack.root)) == ["base", "tool", "who", "work"]
        assert (stack.root / "who").read_text() == "tool"
    with pytest.raises(ImageMissing, match=r"no image is called 'absent' here.*base, tool, work"):
        store.environment(Env(base="absent"))


def test_a_mode_that_is_named_must_work(store: Store, tmp_path: Path, fill: Fill, monkeypatch):
    from fathom.sandbox import syscalls

    image = image_of_folder(store, fill(tmp_path / "a"), "one")

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "mount: Operation not permitted")

    monkeypatch.setattr(syscalls, "mount", refuse)
    with pytest.raises(Unsupported, match=r"cannot be mounted here .erofs: .*not permitted"):
        compose(store, image, place(tmp_path, "m"), mode="erofs")
    stack = compose(store, image, tmp_path / "m")
    assert (stack.mode, stack.join) == ("folders", "single")
    stack.close()
    assert list((tmp_path / "m").iterdir()) == []

"""The store: whole files or none, holds, collection, damage, a full disk, many builders."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.sandbox import syscalls
from fathom.sandbox.images import (
    Image,
    ImageDamaged,
    ImageError,
    ImageMissing,
    Layer,
    Store,
    StoreFull,
    compose,
    flatten,
    image_of_folder,
    pack_folder,
    remote,
    snapshot,
)
from fathom.sandbox.images.care import check, collect
from fathom.sandbox.images.recipe import build
from fathom.sandbox.images.types import check_name

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    (made / "a").write_bytes(os.urandom(600_000))
    (made / "b").write_text("b")
    return made


def contents(store: Store) -> set[str]:
    return {
        str(path.relative_to(store.folder))
        for path in store.folder.rglob("*")
        if path.is_file() and path.parent.name != "holds" and path.name != "lock"
    }


def test_the_written_form_is_the_same_for_equal_values(store: Store, folder: Path):
    image = image_of_folder(store, folder, "one")
    assert Image.decode(image.encode()) == image
    layer = store.layer(image.layers[0])
    assert Layer.decode(layer.encode()) == layer
    assert (
        layer.encode()
        == json.dumps(json.loads(layer.encode()), sort_keys=True, separators=(",", ":")).encode()
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'{"kind":"layer"}',
        b'{"kind":"image","version":2}',
        b'{"kind":"layer","version":1,"meta":["sha256:x",1],"data":[]}',
        b'{"kind":"layer","version":1,"meta":["sha256:' + b"0" * 64 + b'",-1],"data":[]}',
        b'{"kind":"layer","version":1,"meta":["sha256:' + b"0" * 64 + b'",1],"data":[1]}',
        b'{"kind":"layer","version":1,"meta":["sha256:' + b"0" * 64 + b'",1],"data":[],"x":1}',
        b"[" * 100_000,
    ],
)
def test_malformed_descriptions_are_damage(text: bytes):
    with pytest.raises(ImageDamaged):
        Layer.decode(text)
    with pytest.raises(ImageDamaged):
        Image.decode(text.replace(b'"layer"', b'"image"'))


def test_a_newer_format_is_named(store: Store):
    with pytest.raises(ImageDamaged, match="format 2, this program knows 1: update it"):
        Image.decode(b'{"kind":"image","version":2}')


@pytest.mark.parametrize(
    "name", ["", "../x", "a b", "-a", "a" * 201, "x/../y", "sha256:" + "0" * 64]
)
def test_names_that_are_refused(store: Store, name: str):
    with pytest.raises(ImageError, match="cannot name an image"):
        check_name(name)


def test_nobody_gives_an_image_a_name_of_the_program_itself(store: Store, folder: Path):
    """Later machines and workers run on what is called so."""
    name = "builtin/base-0123456789"
    image = image_of_folder(store, folder, "one")
    with pytest.raises(ImageError, match="names below builtin/ are this program's own"):
        store.tag(name, image.digest)
    for give in (
        lambda: image_of_folder(store, folder, name),
        lambda: store.put_image(image, name),
        lambda: snapshot(store, image, folder, name=name),
        lambda: build(store, "FROM one", folder, name),
        lambda: remote.attach(store, str(folder), name),
        lambda: remote.push(store, image, str(folder), name),
    ):
        with pytest.raises(ImageError, match="are this program's own"):
            give()
    assert list(store.names()) == ["one"]
    store.put_image(image, name, own=True)
    assert store.resolve(name) == image


def test_names_and_versions(store: Store, folder: Path):
    first = image_of_folder(store, folder, "team/app:1")
    (folder / "b").write_text("changed")
    second = image_of_folder(store, folder, "team/app:1")
    assert store.resolve("team/app:1") == second
    assert store.resolve(f"team/app:1@{first.digest}") == first
    assert store.resolve(first.digest) == first
    assert store.names() == {"team/app:1": second.digest}
    store.untag("team/app:1")
    with pytest.raises(ImageMissing):
        store.untag("team/app:1")


def test_an_image_needs_its_layers(store: Store):
    with pytest.raises(ImageMissing, match=r"the layer sha256:0+ is not in the store"):
        store.put_image(Image(layers=("sha256:" + "0" * 64,)), "x")
    assert store.names() == {}


def test_collection_keeps_names_holds_and_what_is_published(store: Store, folder: Path):
    kept = image_of_folder(store, folder, "kept")
    alone = contents(store)
    (folder / "a").write_bytes(os.urandom(500_000))
    held = image_of_folder(store, folder, "held")
    (folder / "a").write_bytes(os.urandom(510_000))
    image_of_folder(store, folder, "gone")
    hold = store.hold(held.digest)
    store.untag("held")
    store.untag("gone")
    assert collect(store, dry_run=True).removed == 5
    done = collect(store)
    assert done.removed == 5
    assert done.freed > 500_000
    assert store.image(held.digest) == held
    assert check(store) == []
    hold.close()
    collect(store)
    assert contents(store) == alone
    assert store.resolve("kept") == kept
    with pytest.raises(ImageMissing):
        store.hold(held.digest)
    # Published and not named: it stays while this object is open, and no longer.
    unnamed = pack_folder(store, folder)
    assert collect(store).removed == 0
    store.close()
    assert collect(store).removed == 4
    with pytest.raises(ImageMissing):
        store.layer(unnamed.digest)


def test_what_a_dead_process_held_is_collected(store: Store, folder: Path):
    image = image_of_folder(store, folder, "one")
    code = (
        "import os, sys; from fathom.sandbox.images import Store; "
        "hold = Store(sys.argv[1]).hold(sys.argv[2]); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder), image.digest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        store.untag("one")
        assert collect(store).removed == 0
        process.kill()
        process.wait()
    assert collect(store).removed == 5
    assert contents(store) == set()
    store.close()
    assert list((store.folder / "holds").iterdir()) == []


def test_no_collection_takes_a_hold_that_is_being_made(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    image = image_of_folder(store, folder, "one")
    real = fcntl.flock
    between: list[int] = []

    def lock(fd: int, how: int) -> None:
        if not between and "/holds/" in os.readlink(f"/proc/self/fd/{fd}"):
            between.append(fd)
            collect(store)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with store.hold(image.digest):
        assert between
        store.untag("one")
        assert collect(store).removed == 0
    assert collect(store).removed == 5


def test_a_mounted_layer_survives_its_removal(
    need_root, store: Store, folder: Path, tmp_path: Path
):
    image = image_of_folder(store, folder, "one")
    (tmp_path / "m").mkdir()
    with compose(store, image, tmp_path / "m") as stack:
        store.untag("one")
        assert collect(store).removed == 1  # the image's description: only its layers are mounted
        for path in store.folder.rglob("*"):
            if path.is_file() and path.parent.name in ("blobs", "data"):
                path.unlink()
        syscalls_drop_caches()
        assert (stack.root / "a").read_bytes() == (folder / "a").read_bytes()


def syscalls_drop_caches() -> None:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        pytest.skip("the kernel's cache cannot be dropped here")


@pytest.mark.parametrize("kind", ["blobs", "data", "sums"])
def test_damage_is_found_and_named(store: Store, folder: Path, kind: str):
    image = image_of_folder(store, folder, "one")
    layer = store.layer(image.layers[0])
    path = {
        "blobs": store.path(layer.meta),
        "data": store.data_path(layer.data[0].digest),
        "sums": store.sums_path(layer.data[0].digest),
    }[kind]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert path.name in {problem.subject for problem in check(store)}
    assert path.exists()
    found = check(store, repair=True)
    assert any(problem.repaired and problem.subject == path.name for problem in found)
    assert not path.exists()
    assert any(problem.subject == "one" for problem in found)
    # Packing the same folder again brings back exactly what was lost.
    assert pack_folder(store, folder).digest == image.layers[0]
    assert check(store) == []


def test_damaged_metadata_is_not_read(store: Store, folder: Path):
    image = image_of_folder(store, folder, "one")
    path = store.path(store.layer(image.layers[0]).meta)
    path.unlink()
    path.write_bytes(bytes(4096))
    with pytest.raises(ImageDamaged, match="fsck"):
        store.tree(image.layers[0])


def test_many_builders_at_the_same_time(store: Store, folder: Path):
    code = (
        "import sys; from fathom.sandbox.images import *; from pathlib import Path; "
        "from fathom.sandbox.images.care import collect; s = Store(sys.argv[1], durable=False)\n"
        "for n in range(4):\n"
        "    i = image_of_folder(s, Path(sys.argv[2]), f'n{n}'); collect(s); flatten(s, i.layers)\n"
        "print(i.digest)"
    )
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.folder), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for _ in range(4)
    ]
    said = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * 4, said
    assert len({out for out, _ in said}) == 1
    assert check(store) == []
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_full_disk_leaves_nothing_half_made(need_root, tmp_path: Path, folder: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", str(disk), "tmpfs", 0, "size=1m")
    try:
        with Store(disk / "store", durable=False) as store:
            small = tmp_path / "small"
            small.mkdir()
            (small / "x").write_text("x")
            image_of_folder(store, small, "small")
            before = contents(store)
            (folder / "c").write_bytes(os.urandom(900_000))
            with pytest.raises(StoreFull, match=r"no room left in .*free some space"):
                image_of_folder(store, folder, "large")
            assert contents(store) == before
            assert list((store.folder / "tmp").iterdir()) == []
            assert check(store) == []
            assert flatten(store, store.resolve("small").layers).size > 0
    finally:
        syscalls.unmount(str(disk))


def test_a_store_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="the image store cannot be made"):
        Store(tmp_path / "file" / "store")

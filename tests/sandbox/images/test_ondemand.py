"""Contents that are elsewhere: fetched when read, proven, cached, an error when they cannot be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fathom.errors import Unsupported
from fathom.sandbox.images import (
    Image,
    ImageDamaged,
    ImageError,
    ImageMissing,
    Store,
    compose,
    image_of_folder,
    snapshot,
)
from fathom.sandbox.images.blobs import CHUNK
from fathom.sandbox.images.care import check, collect, describe
from fathom.sandbox.images.ondemand import BlobCache
from fathom.sandbox.images.remote import attach, fetch, push
from tests.sandbox.images.listing import listing
from tests.sandbox.images.web import Served, serve

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    chance = random.Random(5)
    for number in range(20):
        (made / f"file{number:02}").write_bytes(chance.randbytes(200_000 + number))
    (made / "large").write_bytes(chance.randbytes(2_000_000))
    return made


@pytest.fixture
def origin(tmp_path: Path, folder: Path) -> Path:
    with Store(tmp_path / "maker", durable=False) as maker:
        image = image_of_folder(maker, folder, "app:1")
        push(maker, image, str(tmp_path / "origin"), "app:1")
    return tmp_path / "origin"


@pytest.fixture
def web(origin: Path) -> Iterator[Served]:
    with serve(origin) as served:
        yield served


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    made.mkdir()
    return made


@pytest.fixture
def need_fuse(need_root: None) -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse cannot be opened: {error}")


@pytest.fixture(autouse=True)
def no_server_left() -> Iterator[None]:
    yield
    for _ in range(100):
        if not servers():
            break
        time.sleep(0.05)
    assert servers() == []


def servers() -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "fathom.sandbox.images.ondemand" in words and any("pytest-" in w for w in words):
            found.append(path.parent.name)
    return found


def test_a_mount_reads_metadata_only(
    need_fuse, store: Store, web: Served, place: Path, folder: Path
):
    image = attach(store, web.address, "app:1")
    total = sum(store.layer(one).size for one in image.layers)
    taken = sum(web.sent.values())
    assert taken < total / 100
    assert web.bytes_of("/data/") == web.bytes_of(".sums")
    with compose(store, image, place) as stack:
        assert stack.caps.on_demand
        names = {path.name: path.stat().st_size for path in stack.root.iterdir()}
        assert names == {path.name: path.stat().st_size for path in folder.iterdir()}
        assert sum(web.sent.values()) == taken
        assert (stack.root / "file07").read_bytes() == (folder / "file07").read_bytes()
        # The kernel reads ahead: the last of what was sent may still be on its way to the cache.
        deadline = time.monotonic() + 10
        while describe(store, image)[0][3] != (once := sum(web.sent.values()) - taken):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert 200_000 < once <= 4 * CHUNK
        assert listing(stack.root) == listing(folder)
    # Another mount, cold caches of the kernel: everything is in the local cache now.
    taken = sum(web.sent.values())
    with compose(store, image, place) as stack:
        assert listing(stack.root) == listing(folder)
    assert sum(web.sent.values()) == taken
    assert list(place.iterdir()) == []


def test_writes_over_contents_that_are_elsewhere(
    need_fuse, store, web: Served, place: Path, tmp_path
):
    image = attach(store, web.address, "app:1")
    (tmp_path / "u").mkdir()
    with compose(store, image, place, upper=tmp_path / "u") as stack:
        (stack.root / "file01").unlink()
        with (stack.root / "file02").open("ab") as file:
            file.write(b"more")
        expected = listing(stack.root)
        later = snapshot(store, image, tmp_path / "u", name="later")
    with compose(store, later, place) as stack:
        assert listing(stack.root) == expected


@pytest.mark.parametrize("kind", ["damaged", "down", "cut"])
def test_what_cannot_be_fetched_is_an_error_and_never_zeros(
    need_fuse, store: Store, web: Served, place: Path, folder: Path, kind: str
):
    image = attach(store, web.address, "app:1")
    with compose(store, image, place) as stack:
        if kind == "damaged":
            web.damage = lambda path, content: bytes(len(content))
        elif kind == "cut":
            web.damage = lambda path, content: content[: len(content) // 2]
        web.down = kind == "down"
        with pytest.raises(OSError, match="Input/output error"):
            (stack.root / "large").read_bytes()
        web.damage, web.down = None, False
        assert (stack.root / "large").read_bytes() == (folder / "large").read_bytes()
    assert "problem=contents cannot be fetched" in (store.folder / "ondemand.log").read_text()


def test_a_killed_server_is_an_error_and_never_zeros(need_fuse, store, web, place, folder):
    image = attach(store, web.address, "app:1")
    with compose(store, image, place) as stack:
        for pid in servers():
            os.kill(int(pid), 9)
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment
            (stack.root / "large").read_bytes()
    with compose(store, image, place) as stack:
        assert (stack.root / "large").read_bytes() == (folder / "large").read_bytes()


def test_a_server_ends_when_its_namespace_does(need_fuse, store: Store, web: Served, place: Path):
    """A keeper that is killed takes back nothing: the kernel does, and the server must let it."""
    image = attach(store, web.address, "app:1")
    code = (
        "import os, sys; from pathlib import Path; from fathom.sandbox import syscalls\n"
        "from fathom.sandbox.images import Store, compose\n"
        "syscalls.unshare(syscalls.CLONE_NEWNS)\n"
        "syscalls.mount('none', '/', None, syscalls.MS_REC | syscalls.MS_PRIVATE)\n"
        "store = Store(sys.argv[1]); image = store.resolve('app:1')\n"
        "place = Path(sys.argv[2]); upper = place / 'u'; upper.mkdir()\n"
        "a = place / 'a'; a.mkdir(); one = compose(store, image, a)\n"
        "b = place / 'b'; b.mkdir(); two = compose(store, image, b, upper=upper)\n"
        "print((two.root / 'file03').stat().st_size, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"200003\n"
        assert len(servers()) == 2
        # What the servers read is held by them, whoever started them.
        store.untag("app:1")
        collect(store)
        assert store.path(store.layer(image.layers[0]).meta).exists()
        process.kill()
        process.wait()


def test_contents_are_fetched_whole_when_asked(need_root, store, web: Served, place: Path, folder):
    image = attach(store, web.address, "app:1")
    size = fetch(store, image)
    assert size == sum(blob.size for one in image.layers for blob in store.layer(one).data)
    assert web.bytes_of("/data/") - web.bytes_of(".sums") == size
    assert fetch(store, image) == 0
    assert check(store) == []
    with compose(store, image, place) as stack:
        assert not stack.caps.on_demand
        assert listing(stack.root) == listing(folder)


def test_folders_fetch_only_what_files_need(store: Store, web: Served, place: Path, folder: Path):
    image = attach(store, web.address, "app:1")
    with compose(store, image, place, mode="folders") as stack:
        assert not stack.caps.on_demand
        assert listing(stack.root, owners=False) == listing(folder, owners=False)


def test_any_filesystem_of_fsspec_will_do(store: Store, origin: Path, folder: Path, place: Path):
    memory = fsspec.filesystem("memory")
    memory.put(str(origin), "/images", recursive=True)
    try:
        image = attach(store, "memory://images", "app:1")
        (layer,) = (store.layer(one) for one in image.layers)
        cache = BlobCache(store, layer.data[0])
        large = store.tree(image.layers[0]).children[b"large"]
        assert large.data is not None
        assert cache.read(large.data[1], large.size) == (folder / "large").read_bytes()
        assert cache.present < layer.data[0].size
        cache.close()
        if os.geteuid() == 0:
            with pytest.raises(Unsupported, match=r"memory:.*this process only"):
                compose(store, image, place, mode="erofs")
        assert fetch(store, image) == layer.data[0].size
        push(store, image, "memory://other", "copy")
        assert attach(store, "memory://other", "copy") == image
    finally:
        memory.rm("/images", recursive=True)
        if memory.exists("/other"):
            memory.rm("/other", recursive=True)


def test_a_server_without_ranges_will_do(store: Store, web: Served, folder: Path):
    web.ranges = False
    image = attach(store, web.address, "app:1")
    fetch(store, image)
    assert check(store) == []


def test_chunks_of_an_earlier_boot_are_proven_again(store: Store, origin: Path):
    image = attach(store, str(origin), "app:1")
    blob = store.layer(image.layers[0]).data[0]
    cache = BlobCache(store, blob)
    expected = cache.read(0, 3 * CHUNK)
    cache.close()
    path = store.cache_path(blob.digest)
    marks = path.with_name(f"{path.name}.map")
    marks.write_bytes(b"x" * 36 + marks.read_bytes()[36:])
    with path.open("r+b") as file:
        file.seek(CHUNK)
        file.write(bytes(CHUNK))  # a power cut lost these, the mark says they are here
    cache = BlobCache(store, blob)
    assert cache.read(0, 3 * CHUNK) == expected
    cache.close()


@pytest.mark.parametrize("what", ["names", "blobs", "data"])
def test_a_lying_origin_is_noticed(store: Store, web: Served, what: str):
    def lie(path: str, content: bytes) -> bytes:
        if path.startswith(f"/{what}/"):
            return b"sha256:" + b"0" * 64 if what == "names" else content[:-1] + b"?"
        return content

    web.damage = lie
    with pytest.raises((ImageDamaged, ImageMissing)):
        attach(store, web.address, "app:1")
    assert store.names() == {}


def test_a_malformed_layer_of_an_origin_never_reaches_the_kernel(
    store: Store, tmp_path: Path, folder
):
    with Store(tmp_path / "maker", durable=False) as maker:
        image = image_of_folder(maker, folder, "app:1")
        layer = maker.layer(image.layers[0])
        content = bytearray(maker.read(layer.meta))
        content[1038] ^= 0xFF  # another root, under a digest that fits
        from fathom.sandbox.images import Layer

        bad = Layer(meta=maker.put(bytes(content)), meta_size=len(content), data=layer.data)
        maker.put(bad.encode())
        push(maker, Image(layers=(bad.digest,)), str(tmp_path / "origin"), "bad")
    with pytest.raises(ImageDamaged, match="checksum"):
        attach(store, str(tmp_path / "origin"), "bad")


def test_addresses_that_cannot_be_read(store: Store, tmp_path: Path):
    with pytest.raises(ImageMissing, match="does not exist"):
        attach(store, str(tmp_path / "nowhere"), "app")
    with pytest.raises(ImageError, match="cannot be read"):
        attach(store, "http://127.0.0.1:9", "app")
    with pytest.raises(ImageError, match="not an address"):
        attach(store, "nonsense://x", "app")

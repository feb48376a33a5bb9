"""Images of others: from layouts, archives and a real registry, and every way to attack by one."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import shutil
import socket
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from fathom.sandbox.images import (
    ArchiveRefused,
    ImageDamaged,
    ImageError,
    ImageMissing,
    ImageTooLarge,
    RegistryError,
    Store,
    StoreFull,
    compose,
    tree,
)
from fathom.sandbox.images.care import check, collect
from fathom.sandbox.images.export import write_archive
from fathom.sandbox.images.oci import import_archive
from fathom.sandbox.images.packed import Reader, decompress
from fathom.sandbox.images.registry import parse_reference, pull
from fathom.sandbox.images.tarball import Limits
from tests.sandbox.images.archives import Layout, digest, entry, tar
from tests.sandbox.images.listing import listing

DIR, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

BASE = tar(
    entry("etc", type=DIR, mode=0o755),
    entry("etc/passwd", b"root:x:0:0::/:/bin/sh\n", mode=0o644, uid=0),
    entry("etc/shadow", b"secret", mode=0o600, uid=3, gid=42, mtime=1234567),
    entry("bin", type=DIR, mode=0o755),
    entry("bin/tool", b"#!/bin/sh\n", mode=0o4755),
    entry("bin/again", type=HARD, linkname="bin/tool"),
    entry("bin/abs", type=LINK, linkname="/bin/tool"),
    entry("opt/deep/er/file", b"x" * 5000),
    entry("opt/old", b"old"),
    entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("caf\u00e9 \u2713", b"unicode", pax_headers={"SCHILY.xattr.user.note": "kept"}),
)
TOP = tar(
    entry("etc/.wh.shadow"),
    entry("opt/", type=DIR, mode=0o700),
    entry("opt/.wh..wh..opq"),
    entry("opt/new", b"new"),
    entry("bin/tool", b"changed", mode=0o755),
    entry(".wh.absent"),
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def load(store: Store, layout: Layout, *layers: bytes, **options: object):
    return import_archive(store, layout.index(layout.image(*layers)), "x", **options)


def test_what_the_kernel_shows_of_an_image(need_root, store: Store, layout: Layout, tmp_path: Path):
    made = layout.image(
        BASE,
        TOP,
        Env=["PATH=/bin", "A=b=c"],
        Cmd=["tool"],
        WorkingDir="/etc",
        User="3:42",
        Entrypoint=None,
    )
    image = import_archive(store, layout.index(made), "x")
    assert image.run.env == (("PATH", "/bin"), ("A", "b=c"))
    assert (image.run.command, image.run.workdir, image.run.user) == (("tool",), "/etc", "3:42")
    (tmp_path / "m").mkdir()
    with compose(store, image, tmp_path / "m") as stack:
        found = listing(stack.root, times=False)
        assert sorted(name for name in found if name != ".") == [
            "bin",
            "bin/abs",
            "bin/again",
            "bin/tool",
            "caf\u00e9 \u2713",
            "dev",
            "dev/null",
            "etc",
            "etc/passwd",
            "opt",
            "opt/new",
        ]
        assert (stack.root / "bin/tool").read_text() == "changed"
        assert (stack.root / "bin/again").read_text() == "#!/bin/sh\n"
        assert (stack.root / "opt").stat().st_mode & 0o777 == 0o700
        assert os.getxattr(stack.root / "caf\u00e9 \u2713", "user.note") == b"kept"
        assert (stack.root / "dev/null").stat().st_rdev == os.makedev(1, 3)
    lower = store.tree(image.layers[0])
    shadow = tree.find(lower, b"etc/shadow")
    assert shadow is not None
    assert (shadow.uid, shadow.gid, shadow.mtime, shadow.mode & 0o777) == (3, 42, 1234567, 0o600)


@pytest.mark.parametrize("form", ["gnu", "pax", "oldgnu"])
def test_tar_itself_unpacks_the_same(
    need_root, store: Store, layout: Layout, tmp_path: Path, fill: Callable[[Path], Path], form: str
):
    """GNU tar as the oracle, for archives that it wrote itself."""
    source = fill(tmp_path / "source")
    os.removexattr(source / "bin/tool", "user.note")  # only one of the forms keeps it
    (source / ("n" * 150)).mkdir()
    (source / ("n" * 150) / ("m" * 200)).write_text("a long name")
    (source / "long").unlink()
    (source / "long").symlink_to("x/" * 150)
    archive = tmp_path / "a.tar"
    subprocess.run(
        ["tar", f"--format={form}", "-C", str(source), "-cf", str(archive), "."], check=True
    )
    image = load(store, layout, archive.read_bytes())
    (tmp_path / "m").mkdir()
    with compose(store, image, tmp_path / "m") as stack:
        assert listing(stack.root) == listing(source)


@pytest.mark.parametrize(
    "pack",
    [
        lambda d: d,
        lambda d: gzip.compress(d),
        lambda d: zstandard.compress(d),
        lambda d: subprocess.run(["xz", "-c"], input=d, capture_output=True, check=True).stdout,
    ],
)
def test_compressions(store: Store, layout: Layout, pack: Callable[[bytes], bytes]):
    descriptor = layout.image(BASE)
    manifest = json.loads((layout.folder / "blobs/sha256" / descriptor["digest"][7:]).read_text())
    manifest["layers"] = [layout.write(pack(BASE), "application/vnd.oci.image.layer.v1.tar")]
    packed = layout.write(json.dumps(manifest).encode(), manifest["mediaType"])
    image = import_archive(store, layout.index(packed), "x")
    assert tree.find(store.tree(image.layers[0]), b"opt/deep/er/file") is not None


def test_xz_files_in_bounded_memory():
    """One of a few bytes may ask for a dictionary of gigabytes."""
    two = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)
    stream = decompress(io.BytesIO(two))
    assert b"".join(iter(lambda: stream.read(2), b"")) == b"onetwo"
    with pytest.raises(ImageDamaged, match="cannot be decompressed: it ends in the middle"):
        Reader(decompress(io.BytesIO(lzma.compress(b"one")[:-9])), 9).drain()
    made = bytearray(lzma.compress(b"one"))
    # The head of the first block, its one filter, and that one's dictionary: 1 GiB.
    size = 4 * (made[12] + 1)
    made[made.index(b"\x21\x01", 12, 12 + size) + 2] = 36
    made[8 + size : 12 + size] = zlib.crc32(made[12 : 8 + size]).to_bytes(4, "little")
    with pytest.raises(ImageDamaged, match=r"cannot be decompressed: Memory usage limit"):
        Reader(decompress(io.BytesIO(bytes(made))), 9).drain()


def test_the_same_image_again_reads_nothing(store: Store, layout: Layout):
    first = load(store, layout, BASE, TOP)
    for path in (layout.folder / "blobs/sha256").iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path.write_bytes(b"damaged")
    assert import_archive(store, layout.folder, "y") == first
    # Once its layers are gone it has to be read again.
    store.untag("x")
    store.untag("y")
    collect(store)
    assert list((store.folder / "imported").iterdir()) == []
    with pytest.raises(ImageDamaged):
        import_archive(store, layout.folder, "y")


HOSTILE: dict[str, tuple[bytes, type[ImageError], str]] = {
    "a path that leads out": (tar(entry("../evil", b"x")), ArchiveRefused, "leads out"),
    "a path that leads out later": (tar(entry("a/../../evil", b"x")), ArchiveRefused, "leads out"),
    "a file through a link": (
        tar(entry("a", type=LINK, linkname="/etc"), entry("a/passwd", b"x")),
        ArchiveRefused,
        "leads through b'a', which is not a folder",
    ),
    "a file through a link in a folder": (
        tar(entry("d/a", type=LINK, linkname=".."), entry("d/a/x/passwd", b"x")),
        ArchiveRefused,
        "leads through",
    ),
    "a file through a file": (
        tar(entry("a", b"x"), entry("a/b", b"x")),
        ArchiveRefused,
        "leads through",
    ),
    "another name of something outside": (
        tar(entry("a", type=HARD, linkname="/etc/shadow")),
        ArchiveRefused,
        "not in the archive",
    ),
    "another name that leads out": (
        tar(entry("a", type=HARD, linkname="../../etc/shadow")),
        ArchiveRefused,
        "leads out",
    ),
    "another name through a link": (
        tar(entry("l", type=LINK, linkname="/etc"), entry("a", type=HARD, linkname="l/shadow")),
        ArchiveRefused,
        "not in the archive",
    ),
    "another name of a folder": (
        tar(entry("d", type=DIR), entry("a", type=HARD, linkname="d")),
        ArchiveRefused,
        "a folder",
    ),
    "another name of the root": (
        tar(entry("a", type=HARD, linkname="/")),
        ArchiveRefused,
        "a folder",
    ),
    "a disk": (
        tar(entry("sda", type=tarfile.BLKTYPE, devmajor=8)),
        ArchiveRefused,
        "the device 8:0",
    ),
    "the memory": (
        tar(entry("mem", type=tarfile.CHRTYPE, devmajor=1, devminor=1)),
        ArchiveRefused,
        "the device 1:1",
    ),
    "a forged deletion": (
        tar(entry("gone", type=tarfile.CHRTYPE)),
        ArchiveRefused,
        "the device 0:0",
    ),
    "a forged attribute": (
        tar(entry("d", type=DIR, pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/etc"})),
        ArchiveRefused,
        "overlay's own attribute",
    ),
    "a forged attribute for users": (
        tar(entry("d", type=DIR, pax_headers={"SCHILY.xattr.user.overlay.opaque": "y"})),
        ArchiveRefused,
        "overlay's own attribute",
    ),
    "the same file twice": (tar(entry("a", b"1"), entry("./a", b"2")), ArchiveRefused, "twice"),
    "a file that was a folder": (
        tar(entry("a/b", b"1"), entry("a", b"2")),
        ArchiveRefused,
        "twice",
    ),
    "a mark of a mark": (tar(entry(".wh..wh.x")), ArchiveRefused, "mark of a mark"),
    "a mark of nothing": (tar(entry(".wh.")), ArchiveRefused, "cannot be the name"),
    "a mark that leads out": (tar(entry(".wh...")), ArchiveRefused, "cannot be the name"),
    "an endless path": (tar(entry("d/" * 600 + "x", b"1")), ArchiveRefused, "nested"),
    "an endless name": (tar(entry("n" * 300, b"1")), ArchiveRefused, "cannot be the name"),
    "an endless link": (
        tar(entry("l", type=LINK, linkname="x" * 5000)),
        ArchiveRefused,
        "nothing possible",
    ),
    "an empty link": (tar(entry("l", type=LINK)), ArchiveRefused, "nothing possible"),
    "a huge header": (
        tar(entry("a", b"", pax_headers={"comment": "x" * (2 << 20)})),
        ArchiveRefused,
        "a header of the archive has",
    ),
    "an owner that is no number": (
        tar(entry("a", uid=-5), form=tarfile.GNU_FORMAT),
        ArchiveRefused,
        "belongs to -5",
    ),
    "more than it may unpack to": (
        tar(entry("zeros", bytes(6 << 20))),
        ImageTooLarge,
        "unpacks to more than",
    ),
    "too many entries": (
        tar(*(entry(f"f{n}") for n in range(200))),
        ImageTooLarge,
        "more than 100 entries",
    ),
    "not an archive": (b"no tar at all" * 100, ImageDamaged, "malformed"),
    "an archive that ends early": (BASE[:4000], ImageDamaged, "malformed"),
    "a root that is a file": (tar(entry(".", b"x")), ArchiveRefused, "not a folder"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(store: Store, layout: Layout, case: str, tmp_path: Path):
    archive, kind, text = HOSTILE[case]
    image = layout.index(layout.image(archive))
    around = {path for path in tmp_path.rglob("*") if "/store/" not in str(path)}
    with pytest.raises(kind, match=text.replace("(", r"\(")):
        import_archive(store, image, "x", limits=Limits(size=4 << 20, entries=100))
    assert store.names() == {}
    assert list((store.folder / "tmp").iterdir()) == []
    assert collect(store).kept == 0
    assert {path for path in tmp_path.rglob("*") if "/store/" not in str(path)} == around


def test_a_bomb_is_noticed_while_it_unpacks(store: Store, layout: Layout):
    """Two gigabytes of zeros in two megabytes, which say that they are one small file."""
    small = tar(entry("a", b"x"))
    bomb = small[:-8192] + bytes(64 << 20)
    with pytest.raises(ImageTooLarge, match="may be a bomb"):
        load(store, layout, bomb, limits=Limits(size=8 << 20))


def test_a_sparse_bomb_is_noticed_by_its_header(store: Store, layout: Layout):
    member, _ = entry("a", b"")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a",
        "GNU.sparse.realsize": str(1 << 45),
    }
    content = b"1\n0\n0\n".ljust(512, b"\0")
    member.size = len(content)
    with pytest.raises(ImageError):
        load(store, layout, tar((member, content)))


def damage_manifest(layout: Layout, change: Callable[[dict], None]) -> Path:
    made = layout.image(BASE)
    manifest = json.loads((layout.folder / "blobs/sha256" / made["digest"][7:]).read_text())
    change(manifest)
    return layout.index(layout.write(json.dumps(manifest).encode(), made["mediaType"]))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda m: m["layers"][0].update(digest="sha256:" + "0" * 64), ImageMissing, "has no"),
        (lambda m: m["layers"][0].update(digest="../../etc/passwd"), ImageDamaged, "not a digest"),
        (
            lambda m: m["layers"][0].update(digest="sha512:" + "0" * 128),
            ImageDamaged,
            "not a digest",
        ),
        (lambda m: m["layers"][0].update(size=5), ImageDamaged, "does not match"),
        (lambda m: m["layers"][0].update(size=-1), ImageDamaged, "no proper size"),
        (lambda m: m["layers"][0].update(urls=["http://x"]), ImageError, "address of its own"),
        (lambda m: m["layers"].append(m["layers"][0]), ImageDamaged, "2 layers and 1 digests"),
        (lambda m: m.update(layers={}), ImageDamaged, "not a list"),
        (lambda m: m.update(schemaVersion=1), ImageDamaged, "old or unknown"),
        (lambda m: m.pop("config"), ImageDamaged, "no proper size"),
    ],
)
def test_manifests_that_lie(store: Store, layout: Layout, change, kind, text):
    with pytest.raises(kind, match=text):
        import_archive(store, damage_manifest(layout, change), "x")
    assert store.names() == {}


def test_damaged_pieces(store: Store, layout: Layout):
    made = layout.image(BASE)
    folder = layout.index(made)
    for path in (layout.folder / "blobs/sha256").iterdir():
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ImageDamaged, match=r"does not match|not JSON"):
            import_archive(store, folder, "x")
        path.write_bytes(good)
    other = layout.image(TOP)
    manifest = json.loads((folder / "blobs/sha256" / other["digest"][7:]).read_text())
    mixed = json.loads((folder / "blobs/sha256" / made["digest"][7:]).read_text())
    mixed["layers"] = manifest["layers"]
    swapped = layout.write(json.dumps(mixed).encode(), mixed["mediaType"])
    with pytest.raises(ImageDamaged, match="unpacks to"):
        import_archive(store, layout.index(swapped), "x")


def test_the_platform_is_chosen(store: Store, layout: Layout):
    here, there = layout.image(BASE), layout.image(TOP)
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {**there, "platform": {"os": "linux", "architecture": "arm64"}},
            {**there, "platform": {"os": "windows", "architecture": "amd64"}},
            {**here, "platform": {"os": "linux", "architecture": "amd64"}},
        ],
    }
    folder = layout.index(layout.write(json.dumps(index).encode(), index["mediaType"]))
    first = import_archive(store, folder, "x", architecture="amd64")
    assert first == load(store, layout, BASE)
    layout.index(layout.write(json.dumps(index).encode(), index["mediaType"]))
    assert import_archive(store, folder, "y", architecture="arm64") != first
    with pytest.raises(ImageMissing, match=r"linux/s390x, only for: linux/arm64, windows/amd64"):
        import_archive(store, folder, "z", architecture="s390x")


def test_an_index_in_itself_ends(store: Store, layout: Layout):
    inner = layout.image(BASE)
    for _ in range(6):
        inner = layout.write(
            json.dumps({"schemaVersion": 2, "manifests": [inner]}).encode(),
            "application/vnd.oci.image.index.v1+json",
        )
    with pytest.raises(ImageDamaged, match="nested too deep"):
        import_archive(store, layout.index(inner), "x")


def test_the_limit_is_for_all_layers_of_an_image(store: Store, layout: Layout):
    layers = [tar(entry(name, os.urandom(3 << 20))) for name in ("a", "b", "c")]
    place = layout.index(layout.image(*layers))
    with pytest.raises(ImageTooLarge, match="more than 8388608 bytes"):
        import_archive(store, place, "x", limits=Limits(size=8 << 20))
    import_archive(store, place, "x", limits=Limits(size=9 << 20))


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_holes_of_an_archive_take_no_room(
    need_root, store: Store, layout: Layout, tmp_path: Path, form: str
):
    size, marks = 40 << 30, ((1 << 30) + 5, 39 << 30)
    with (tmp_path / "x").open("wb") as file:
        file.truncate(size)
        for at in marks:
            os.pwrite(file.fileno(), b"here", at)
    subprocess.run(
        ["tar", f"--format={form}", "--sparse", "-cf", "x.tar", "x"], cwd=tmp_path, check=True
    )
    place = layout.index(layout.image((tmp_path / "x.tar").read_bytes()))
    roomy = usage(free=1 << 50)
    with pytest.MonkeyPatch.context() as patch:
        # Whether this machine could hold it all is not the question here.
        patch.setattr("shutil.disk_usage", lambda _: roomy)
        image = import_archive(store, place, "x")
    (blob,) = store.layer(image.layers[0]).data
    assert store.data_path(blob.digest).stat().st_blocks * 512 < 4 << 20
    (tmp_path / "m").mkdir()
    with (
        compose(store, image, tmp_path / "m") as stack,
        (stack.root / "x").open("rb") as shown,
    ):
        assert os.fstat(shown.fileno()).st_size == size
        for at in marks:
            assert os.pread(shown.fileno(), 8, at - 2) == b"\0\0here\0\0"


def test_an_image_leaves_room_on_the_disk(store: Store, layout: Layout):
    place = layout.index(layout.image(tar(entry("a", os.urandom(1 << 20)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(free=1 << 20))
        with pytest.raises(StoreFull, match="can spare"):
            import_archive(store, place, "x")


def usage(*, free: int) -> SimpleNamespace:
    return SimpleNamespace(total=1 << 50, used=0, free=free)


def test_a_full_disk_while_unpacking(need_root, layout: Layout, tmp_path: Path):
    from fathom.sandbox import syscalls

    (tmp_path / "disk").mkdir()
    syscalls.mount("tmpfs", str(tmp_path / "disk"), "tmpfs", 0, "size=1m")
    try:
        with Store(tmp_path / "disk/store", durable=False) as small:
            with pytest.raises(StoreFull):
                load(small, layout, tar(entry("a", os.urandom(2 << 20))))
            assert list((small.folder / "tmp").iterdir()) == []
            assert check(small) == []
    finally:
        syscalls.unmount(str(tmp_path / "disk"))


def test_what_is_written_comes_back(store: Store, layout: Layout, tmp_path: Path):
    image = load(store, layout, BASE, TOP)
    write_archive(store, image, tmp_path / "out.tar", "x")
    write_archive(store, image, tmp_path / "again.tar", "x")
    assert (tmp_path / "out.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    with Store(tmp_path / "other", durable=False) as other:
        back = import_archive(other, tmp_path / "out.tar", "x")
        assert [plain(other, one) for one in back.layers] == [
            plain(store, one) for one in image.layers
        ]
        assert back.run == image.run


def plain(store: Store, layer: str) -> list[tuple]:
    return [
        (p, n.mode, n.uid, n.gid, n.mtime, n.size, n.target, n.rdev, n.xattrs)
        for p, n in tree.walk(store.tree(layer))
    ]


# -- a real registry ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Debian's registry on the loopback; the address and where it keeps its files."""
    program = shutil.which("docker-registry")
    if not program or not shutil.which("skopeo"):
        pytest.skip("docker-registry and skopeo are not installed")
    root = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (root / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {root}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}\nlog:\n  level: error\n"
    )
    log = (root / "log").open("wb")
    process = subprocess.Popen([program, "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", root / "data"
    finally:
        process.terminate()
        process.wait()
        log.close()


def skopeo(*words: str) -> str:
    done = subprocess.run(
        ["skopeo", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pull_from_a_registry(registry, store: Store, layout: Layout, tmp_path: Path):
    address, _ = registry
    local = load(store, layout, BASE, TOP)
    skopeo(
        "copy", "--dest-tls-verify=false", f"oci:{layout.folder}", f"docker://{address}/team/app:1"
    )
    with Store(tmp_path / "other", durable=False) as other:
        image = pull(other, f"{address}/team/app:1")
        assert image == local
        assert other.resolve(f"{address}/team/app:1") == image
        assert check(other) == []
        exact = skopeo(
            "inspect",
            "--tls-verify=false",
            "--format",
            "{{.Digest}}",
            f"docker://{address}/team/app:1",
        ).strip()
        assert pull(other, f"{address}/team/app@{exact}", "exact") == image
        with pytest.raises(ImageMissing, match="has no manifests/2"):
            pull(other, f"{address}/team/app:2")
        with pytest.raises(ImageMissing):
            pull(other, f"{address}/team/absent:1")


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_archives_of_skopeo(registry, store: Store, layout: Layout, tmp_path: Path, form: str):
    local = load(store, layout, BASE, TOP)
    path = tmp_path / "image.tar"
    skopeo("copy", f"oci:{layout.folder}", f"{form}:{path}:app:1")
    with Store(tmp_path / "other", durable=False) as other:
        assert import_archive(other, path, "x") == local
    path.write_bytes(gzip.compress(path.read_bytes()))
    with Store(tmp_path / "third", durable=False) as other:
        assert import_archive(other, path, "x") == local


def test_skopeo_takes_what_we_write_and_a_registry_gives_it_back(
    registry, store: Store, layout: Layout, tmp_path: Path
):
    address, _ = registry
    image = load(store, layout, BASE, TOP)
    write_archive(store, image, tmp_path / "out.tar", "app:1")
    skopeo(
        "copy",
        "--dest-tls-verify=false",
        "--format=v2s2",
        f"oci-archive:{tmp_path}/out.tar",
        f"docker://{address}/ours/app:1",
    )
    with Store(tmp_path / "other", durable=False) as other:
        back = pull(other, f"{address}/ours/app:1", "x")
        assert [plain(other, one) for one in back.layers] == [
            plain(store, one) for one in image.layers
        ]


def test_a_registry_with_damaged_files(registry, store: Store, layout: Layout):
    address, data = registry
    archive = tar(entry("only here", os.urandom(100_000)))
    made = layout.image(archive)
    layout.index(made)
    skopeo(
        "copy",
        "--dest-tls-verify=false",
        f"oci:{layout.folder}",
        f"docker://{address}/damaged/app:1",
    )
    packed = digest(gzip.compress(archive, mtime=0))[7:]
    path = data / "docker/registry/v2/blobs/sha256" / packed[:2] / packed / "data"
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageDamaged, match="sent something else than"):
        pull(store, f"{address}/damaged/app:1", "x")
    path.write_bytes(content[:1000])
    with pytest.raises((RegistryError, ImageDamaged)):
        pull(store, f"{address}/damaged/app:1", "x")
    assert store.names() == {}
    assert list((store.folder / "tmp").iterdir()) == []


def test_references():
    assert parse_reference("debian").address == "https://registry-1.docker.io"
    assert parse_reference("debian").repository == "library/debian"
    assert parse_reference("me/app:2").version == "2"
    assert parse_reference("quay.io/a/b/c").version == "latest"
    assert parse_reference("localhost:5000/a").address == "http://localhost:5000"
    assert parse_reference("http://host.example:1/a").address == "http://host.example:1"
    exact = "sha256:" + "a" * 64
    assert parse_reference(f"host.example/a:1@{exact}").version == exact
    for bad in (
        "",
        "A/B",
        "x/../y",
        "h.example/a:b:c",
        "h.example/a@sha256:1",
        "h.example/a?x=1",
        "user@h.example/a",
        "h.example/a b",
    ):
        with pytest.raises(RegistryError, match="is not a reference"):
            parse_reference(bad)


def test_a_registry_that_is_not_there(store: Store):
    with pytest.raises(RegistryError, match="cannot be reached"):
        pull(store, "127.0.0.1:9/a/b", timeout=2)

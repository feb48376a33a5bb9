"""Hostile and unusual metadata images: the reader refuses them before the kernel sees them."""

from __future__ import annotations

import random
import stat
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.sandbox.images import ImageDamaged, erofs, erofs_read, tree
from fathom.sandbox.images.tree import Node

names = st.binary(min_size=1, max_size=255).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)
owners = st.integers(0, 2**32 - 1)
attributes = st.dictionaries(
    st.sampled_from(
        [
            "user.a",
            "user." + "b" * 200,
            "trusted.overlay.opaque",
            "security.capability",
            "system.posix_acl_access",
        ]
    ),
    st.binary(max_size=5000),
    max_size=3,
)


def files(kind: int, **values: object) -> st.SearchStrategy[Node]:
    return st.builds(
        Node,
        mode=st.integers(0, 0o7777).map(lambda m: kind | m),
        uid=owners,
        gid=owners,
        mtime=st.integers(0, 2**40),
        xattrs=attributes,
        **values,
    )


leaves = st.one_of(
    files(stat.S_IFREG),
    files(
        stat.S_IFREG,
        size=st.integers(1, 1 << 20),
        data=st.tuples(st.integers(0, 2), st.integers(0, 1000).map(lambda b: b * 4096)),
    ),
    files(stat.S_IFLNK, target=st.binary(min_size=1, max_size=4095)),
    files(stat.S_IFCHR, rdev=st.integers(0, 2**32 - 1)),
    files(stat.S_IFIFO),
)
trees = st.recursive(
    st.dictionaries(names, leaves, max_size=40),
    lambda inner: st.dictionaries(
        names,
        st.one_of(leaves, inner.flatmap(lambda c: files(stat.S_IFDIR, children=st.just(c)))),
        max_size=20,
    ),
    max_leaves=120,
).flatmap(lambda c: files(stat.S_IFDIR, children=st.just(c)))
SIZES = [8 << 20, 8 << 20, 8 << 20]


@settings(max_examples=25, deadline=None)
@given(trees)
def test_every_tree_comes_back(root: Node):
    image = erofs.write(root, SIZES)
    assert erofs_read.read(image, SIZES) == root
    assert erofs.write(erofs_read.read(image, SIZES), SIZES) == image


def sample() -> bytes:
    root = tree.folder()
    below = tree.folder()
    root.children = {b"d": below, b"f": Node(mode=0o100644, size=9000, data=(0, 4096))}
    below.children = {f"{n:04}".encode(): Node(mode=0o120777, target=b"t" * 40) for n in range(100)}
    return erofs.write(root, [1 << 20])


def fix_checksum(image: bytearray) -> bytes:
    image[1028:1032] = bytes(4)
    struct.pack_into("<I", image, 1028, erofs.crc32c(bytes(image[1024:4096])))
    return bytes(image)


def test_hundreds_of_damaged_images_are_refused_or_read():
    """Never another error, an endless loop or a tree with impossible names."""
    chance = random.Random(1)
    image = sample()
    refused = 0
    for _ in range(300):
        damaged = bytearray(image)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(1024, len(damaged))] = chance.choice([0, 1, 0x7F, 0xFF])
        try:
            root = erofs_read.read(fix_checksum(damaged), [1 << 20])
        except ImageDamaged:
            refused += 1
        else:
            for path, node in tree.walk(root):
                assert b".." not in path.split(b"/")
                assert node.data is None or node.data[1] + node.size <= 1 << 20
    assert refused > 30


@pytest.mark.parametrize("length", [0, 100, 4095, 4097, 8192])
def test_cut_images(length: int):
    with pytest.raises(ImageDamaged):
        erofs_read.read(sample()[:length], [1 << 20])


def test_a_checksum_that_does_not_match():
    image = bytearray(sample())
    image[2000] ^= 1
    with pytest.raises(ImageDamaged, match="checksum"):
        erofs_read.read(bytes(image), [1 << 20])


def test_files_beyond_their_blob_are_refused():
    with pytest.raises(ImageDamaged, match="shorter than"):
        erofs_read.read(sample(), [4096])
    root = tree.folder()
    root.children = {b"f": Node(mode=0o100644, size=9000, data=(0, 1 << 20))}
    with pytest.raises(ImageDamaged, match="beyond the end"):
        erofs_read.read(erofs.write(root, [1 << 20]), [1 << 20])


def test_a_folder_in_its_own_folder_is_refused():
    root, below, same = tree.folder(), tree.folder(), tree.folder()
    root.children = {b"a": below}
    below.children = {b"b": same}
    writer = erofs._Writer(root, [], None)
    image = bytearray(writer.image())
    first, last = (struct.pack("<Q", writer.inodes[id(n)].nid) for n in (root, same))
    assert image.count(last) == 2
    # The entry `b` of folder `a` is made to point at the root.
    image = image.replace(last, first)
    with pytest.raises(ImageDamaged, match="two places"):
        erofs_read.read(fix_checksum(image), [])


@pytest.mark.parametrize("of_links", [True, False])
def test_attributes_and_links_that_are_held_in_memory_are_bounded(
    monkeypatch: pytest.MonkeyPatch, of_links: bool
):
    root = tree.folder()
    for number in range(8):
        link = Node(mode=stat.S_IFLNK | 0o777, target=b"t" * 1000)
        file = Node(mode=stat.S_IFREG, xattrs={"user.a": bytes(1000)})
        root.children[b"%d" % number] = link if of_links else file
    image = erofs.write(root, [])
    monkeypatch.setattr(erofs_read, "_MOST_WORDS", 9000)
    assert erofs_read.read(image, []) == root
    monkeypatch.setattr(erofs_read, "_MOST_WORDS", 7000)
    with pytest.raises(ImageDamaged, match="more than 7000 bytes"):
        erofs_read.read(image, [])


def test_attributes_that_files_share_are_held_once():
    """A hostile image: each of its files names the same large attribute hundreds of times."""
    big = Node(mode=stat.S_IFREG, xattrs={"user.big": bytes(60_000)})
    root = tree.folder()
    root.children[b"0"] = big
    for number in range(1, 200):
        # Room for 255 numbers of shared attributes, and nothing else.
        root.children[b"%03d" % number] = Node(
            mode=stat.S_IFREG, xattrs={"user.p": bytes(4 * 255 - 4 - 1)}
        )
    image = bytearray(erofs.write(root, []))
    at = image.index(b"big" + bytes(1000)) - 4
    assert at % 4 == 0
    head = bytes(12) + b"\1\1" + struct.pack("<H", 4 * 255 - 4 - 1) + b"p"
    shared = bytes(4) + b"\xff" + bytes(7) + struct.pack("<I", at // 4) * 255
    changed = 0
    place = image.find(head)
    while place >= 0:
        image[place : place + len(shared)] = shared
        changed += 1
        place = image.find(head, place)
    assert changed == 199
    # Else each file would have a copy of its own, and of any number of attributes.
    found = erofs_read.read(bytes(image), [])
    values = {id(node.xattrs["user.big"]) for _, node in tree.walk(found) if node.xattrs}
    assert len(values) == 2

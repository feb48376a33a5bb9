"""Archives whose headers take what no image needs: memory, folders, time without end."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fathom.sandbox.images import ArchiveRefused, ImageTooLarge, Store, StoreFull
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.oci import import_archive
from fathom.sandbox.images.packed import Reader
from fathom.sandbox.images.tarball import Limits, from_tar
from tests.sandbox.images.archives import entry, tar

BLOCK = 512
MIB = 1 << 20


def load(data: bytes, **limits: int) -> None:
    stream = Reader(io.BytesIO(data), 1 << 30)  # type: ignore[arg-type]
    from_tar(stream, BlobWriter(io.BytesIO()), Limits(**limits))


def pax(values: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a header with text, of values that the library would not write."""
    text = b""
    for key, value in values.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        text += str(length).encode() + rest
    head = tarfile.TarInfo("pax")
    head.type, head.size = kind, len(text)
    return head.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % BLOCK)


def test_folders_that_an_archive_does_not_say_count_as_entries() -> None:
    deep = [entry(f"{number}/" + "d/" * 400 + "file") for number in range(5)]
    load(tar(*deep), entries=2100)
    with pytest.raises(ImageTooLarge, match="entries"):
        load(tar(*deep), entries=1900)


def test_attributes_and_names_that_are_held_in_memory_are_bounded() -> None:
    note = {"SCHILY.xattr.user.note": "x" * (MIB // 2)}
    noted = [entry(f"f{number}", pax_headers=note) for number in range(4)]
    load(tar(*noted), words=3 * MIB)
    with pytest.raises(ImageTooLarge, match="attributes"):
        load(tar(*noted), words=MIB)


def test_a_map_of_holes_is_bounded_in_the_old_form() -> None:
    head = bytearray(tarfile.TarInfo("holes").tobuf(tarfile.GNU_FORMAT))
    head[156:157], head[482:483] = tarfile.GNUTYPE_SPARSE, b"\1"  # more of the map follows
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    more = b"00000000001\0" * 42 + b"\1" + bytes(7)
    with pytest.raises(ArchiveRefused, match="headers of one member"):
        load(bytes(head) + more * 9000)


def test_a_map_of_holes_is_bounded_in_the_new_form() -> None:
    about = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes"}
    member = tarfile.TarInfo("holes")
    member.size = 5 * MIB
    content = b"9999999\n" + b"0\n" * (member.size // 2 - 4)
    data = pax(about) + member.tobuf(tarfile.USTAR_FORMAT) + content
    with pytest.raises(ArchiveRefused, match="headers of one member"):
        load(data)


def test_headers_that_hold_for_all_members_are_bounded_together() -> None:
    for_all = b"".join(pax({f"k{n}": "v" * 30_000}, tarfile.XGLTYPE) for n in range(3))
    with pytest.raises(ArchiveRefused, match="hold for all members"):
        load(for_all + tar(entry("f")))


def test_an_archive_that_leads_back_into_itself_is_refused(tmp_path: Path) -> None:
    back = pax({"size": "-1024"}) + tarfile.TarInfo("f").tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(ArchiveRefused, match="size of -"):
        load(back + bytes(2 * BLOCK))
    (tmp_path / "a.tar").write_bytes(back + bytes(2 * BLOCK))
    with Store(tmp_path / "store") as store, pytest.raises(ArchiveRefused, match="size of -"):
        import_archive(store, tmp_path / "a.tar", "x")


def test_a_packed_archive_leaves_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(4 * MIB)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * MIB))
    with Store(tmp_path / "store") as store, pytest.raises(StoreFull):
        import_archive(store, tmp_path / "a.tar.gz", "x")

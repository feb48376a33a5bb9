"""Servers that send more than anybody wants, and what is left open to others of this machine."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from fathom.sandbox.images import RegistryError, Store, StoreFull, pack_folder, unpack
from fathom.sandbox.images.oci import Descriptor
from fathom.sandbox.images.registry import Registry, parse_reference
from fathom.sandbox.images.remote import open_source
from tests.sandbox.images.archives import digest
from tests.sandbox.images.web import Served, serve

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    return tmp_path / "web"


@pytest.fixture
def web(folder: Path) -> Iterator[Served]:
    with serve(folder) as served:
        yield served


def registry(store: Store, web: Served) -> Registry:
    return Registry(store, parse_reference(f"{web.address}/lib/x"))


def test_a_layer_that_is_fetched_leaves_room_on_the_disk(
    tmp_path: Path, folder: Path, web: Served, monkeypatch: pytest.MonkeyPatch
):
    content = bytes(4 * MIB)
    name = digest(content)
    place = folder / "v2/lib/x/blobs" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * MIB))
    layer = Descriptor(kind="", digest=name, size=len(content))
    with Store(tmp_path / "store") as store, registry(store, web) as source:
        with pytest.raises(StoreFull), source.open(layer):
            pass
        assert list((store.folder / "tmp").iterdir()) == []


def test_a_token_without_end_is_not_read_to_its_end(
    tmp_path: Path, folder: Path, web: Served, monkeypatch: pytest.MonkeyPatch
):
    (folder / "token").write_bytes(bytes(10 * MIB))

    def whole(_: object) -> bytes:
        raise AssertionError("all of it is read")

    monkeypatch.setattr(httpx2.Response, "read", whole)
    with Store(tmp_path / "store") as store, registry(store, web) as source:
        with pytest.raises(RegistryError, match="no token"):
            source._log_in(f'Bearer realm="{web.address}/token"')  # pyright: ignore


def test_what_comes_before_a_range_is_not_held(folder: Path, web: Served):
    content = b"x" * (12 * MIB) + b"wanted" + b"y" * MIB
    (folder / "blob").write_bytes(content)
    web.ranges = False
    source = open_source(f"{web.address}/blob")
    assert source.read(12 * MIB, 12 * MIB + 6) == b"wanted"
    assert source.read(12 * MIB + 3, 14 * MIB) == content[12 * MIB + 3 :]
    tracemalloc.start()
    source.read(12 * MIB, 12 * MIB + 6)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The server, of this process as well, has the file, too.
    assert held < len(content) + 6 * MIB, held


def test_an_image_s_programs_are_nobody_else_s_to_run(tmp_path: Path):
    (tmp_path / "files").mkdir()
    program = tmp_path / "files/program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o4755)
    with Store(tmp_path / "store") as store:
        (store.folder / "unpacked").mkdir(mode=0o755)
        layer = pack_folder(store, tmp_path / "files")
        found = unpack.folder_of(store, layer.digest)
        assert (found / "program").exists()
        assert (store.folder / "unpacked").stat().st_mode & 0o777 == 0o700

"""Layers of Debian packages, with packages that the test makes itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fathom.sandbox.images import BuildFailed, Store, debian, image_of_folder, tree


@pytest.fixture(autouse=True)
def need_dpkg() -> None:
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not installed")


def package(tmp_path: Path, name: str, **files: str) -> Path:
    root = tmp_path / name
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    (root / "DEBIAN/postinst").write_text("#!/bin/sh\ntouch /tmp/fathom-postinst-ran\n")
    (root / "DEBIAN/postinst").chmod(0o755)
    for path, text in files.items():
        place = root / path.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    out = tmp_path / f"{name}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(root), str(out)],
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "1"},
    )
    return out


def test_files_of_packages_and_nothing_that_they_run(store: Store, tmp_path: Path):
    files = [
        package(tmp_path, "one", usr__bin__tool="1", etc__shared="from one"),
        package(tmp_path, "two", usr__bin__other="2", etc__shared="from two"),
    ]
    Path("/tmp/fathom-postinst-ran").unlink(missing_ok=True)
    layer = debian.unpack_packages(store, files)
    root = store.tree(layer.digest)
    assert [p.decode() for p, n in tree.walk(root) if n.is_file] == [
        "etc/shared",
        "usr/bin/other",
        "usr/bin/tool",
    ]
    assert {(n.uid, n.gid) for _, n in tree.walk(root)} == {(0, 0)}
    assert not Path("/tmp/fathom-postinst-ran").exists()
    with Store(tmp_path / "other", durable=False) as other:
        assert debian.unpack_packages(other, files) == layer


def test_what_is_no_package(store: Store, tmp_path: Path):
    (tmp_path / "x.deb").write_bytes(b"!<arch>\nnonsense")
    with pytest.raises(BuildFailed, match="is not a Debian package"):
        debian.unpack_packages(store, [tmp_path / "x.deb"])
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_toolkit_needs_a_debian_system(store: Store, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    image_of_folder(store, tmp_path / "empty", "empty")
    with pytest.raises(BuildFailed, match="empty is not a Debian system"):
        debian.toolkit(store, "x", ["tree"], base="empty")


def test_a_package_that_does_not_exist(store: Store, tmp_path: Path):
    if not shutil.which("apt-get"):
        pytest.skip("apt-get is not installed")
    with pytest.raises(BuildFailed, match="apt-get could not fetch no-such-package-here"):
        debian.download(["no-such-package-here"], tmp_path / "p")


def test_what_mmdebstrap_says_is_passed_on(store: Store):
    if not shutil.which("mmdebstrap"):
        pytest.skip("mmdebstrap is not installed")
    with pytest.raises(BuildFailed, match="mmdebstrap"):
        debian.system(store, "x", variant="no-such-variant")
    assert list((store.folder / "tmp").iterdir()) == []

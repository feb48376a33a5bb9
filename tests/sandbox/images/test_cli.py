"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.sandbox.images import Store
from fathom.sandbox.images.probe import examine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "f"
    made.mkdir()
    (made / "a").write_bytes(os.urandom(10_000))
    (made / "Dockerfile").write_text('FROM one\nARG WHO\nENV WHO=$WHO\nCOPY a /b\nCMD ["x"]\n')
    return made


class Shell:
    def __init__(self, store: Path) -> None:
        self.store = store

    def __call__(self, *words: object, code: int = 0) -> str:
        argv = ["sandbox", "images", *map(str, words)]
        if words[0] != "probe":
            argv += ["--store", str(self.store)]
        done = CliRunner().invoke(app, argv)
        assert done.exit_code == code, done.output
        return done.output

    def json(self, *words: object, code: int = 0):
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "store")


def test_a_store_that_is_not_there_is_not_whole(shell: Shell):
    assert "nothing was proven" in shell("fsck", code=2)
    assert not shell.store.exists()


def test_a_life_of_images(shell: Shell, folder: Path, tmp_path: Path):
    assert shell("ls").split() == ["name", "digest", "layers", "size", "here"]
    made = shell.json("build", "one", folder, "--pack")
    assert made["name"] == "one"
    shell("build", "two", folder, "--arg", "WHO=me")
    about = shell.json("inspect", "two")
    assert about["run"]["env"] == {"WHO": "me"}
    assert about["run"]["command"] == ["x"]
    assert [one["digest"] for one in about["layers"]][:1] == made["layers"]
    assert "contents" in shell("inspect", "two")
    assert set(shell.json("ls")) == {"one", "two"}
    assert "everything matches" in shell("fsck")

    shell("push-archive", "two", tmp_path / "two.tar", "--tag", "two:1")
    with tarfile.open(tmp_path / "two.tar") as archive:
        assert "index.json" in archive.getnames()
    back = shell.json("pull", tmp_path / "two.tar", "--name", "back")
    assert len(back["layers"]) == 2

    shell("push", "two", tmp_path / "origin")
    other = Shell(tmp_path / "other")
    other("pull", "two", "--from", tmp_path / "origin")
    row = other.json("inspect", "two")["layers"][0]
    assert row["local_bytes"] == 0 < row["data_bytes"]
    other("pull", "two", "--from", tmp_path / "origin", "--all")
    assert other.json("inspect", "two")["digest"] == about["digest"]
    assert other.json("inspect", "two")["layers"][0]["local_bytes"] == row["data_bytes"]
    assert other.json("fsck") == []

    shell("rm", "back", "two")
    would = shell.json("gc", "--dry-run")
    assert would["removed"] > 0
    assert shell.json("gc") == would
    assert shell.json("gc")["removed"] == 0
    assert set(shell.json("ls")) == {"one"}


def test_damage_is_an_exit_code(shell: Shell, folder: Path):
    image = shell.json("build", "one", folder, "--pack")
    with Store(shell.store) as store:
        path = store.data_path(store.layer(image["layers"][0]).data[0].digest)
    path.unlink()
    path.write_bytes(bytes(12288))
    found = shell.json("fsck", code=1)
    assert found[0]["subject"] == path.name
    assert "(removed)" in shell("fsck", "--repair", code=1)
    assert "one: the contents" in shell("fsck", code=1)
    shell("build", "one", folder, "--pack")
    shell("fsck")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["inspect", "absent"], 1, "no image is called"),
        (["rm", "absent"], 1, "no image is called"),
        (["build", "x"], 2, "give a folder"),
        (["build", "x", "/nowhere"], 2, "/nowhere does not exist"),
        (["build", "x", "/dev/null"], 2, "/dev/null is not a folder"),
        (["pull", "/nowhere.tar"], 2, "/nowhere.tar does not exist"),
        (["build", "x", "/proc/self/fdinfo"], 2, "does not exist; --pack"),
        (["build", "bad name", "/proc/self/fdinfo", "--pack"], 1, "cannot name an image"),
        (["pull", "not a reference"], 1, "is not a reference"),
        (["pull", "127.0.0.1:9/a:1"], 1, "cannot be reached"),
        (["pull", "x", "--from", "/nowhere"], 1, "does not exist"),
    ],
)
def test_mistakes(shell: Shell, words: list[str], code: int, text: str):
    assert text in " ".join(shell(*words, code=code).split())


def test_what_works_here_is_tried(need_root, shell: Shell):
    found = {one.name: one for one in examine()}
    assert found["layers: folders"].works
    assert set(found) >= {
        "layers: erofs",
        "layers: loop",
        "writes over layers",
        "contents on demand",
    }
    assert all(one.works or one.problem for one in found.values())
    assert shell("probe").count("\n") == len(found)


def test_the_built_in_image_is_packed_once(tmp_path: Path):
    from fathom.sandbox.images import builtin_image, lookup

    with Store(tmp_path / "store", durable=False) as store:
        image = builtin_image(store)
        before = {p.name: p.stat().st_mtime_ns for p in (store.folder / "data").iterdir()}
        assert builtin_image(store) == image
        assert {p.name: p.stat().st_mtime_ns for p in (store.folder / "data").iterdir()} == before
        assert b"root:x:0:0" in lookup.read_file(store, image, "/etc/passwd")

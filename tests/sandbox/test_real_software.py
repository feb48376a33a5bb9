"""Software that nobody here wrote, at work in a sandbox: make and a C compiler, git, pip."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fathom.sandbox import Container, Net, SyncClient, SyncSandbox
from fathom.sandbox.images import Store, image_of_folder, rootfs

TIMEOUT = 60.0
MAKEFILE = """
CC = REALGCC=gcc musl-gcc
CFLAGS = -O1 -Wall -static -fno-use-linker-plugin
all: words
words: main.o count.o
\t$(CC) $(CFLAGS) -o $@ $^
%.o: %.c count.h
\t$(CC) $(CFLAGS) -c -o $@ $<
test: words
\tprintf 'one two\\nthree\\n' | ./words | grep -qx 3
\t./words < /dev/null | grep -qx 0
.PHONY: all test
"""
SOURCES = {
    "Makefile": MAKEFILE,
    "count.h": "int count(int (*next)(void));\n",
    "count.c": """
#include "count.h"
#include <ctype.h>
int count(int (*next)(void)) {
  int words = 0, inside = 0, c;
  while ((c = next()) >= 0) {
    words += !inside && !isspace(c);
    inside = !isspace(c);
  }
  return words;
}
""",
    "main.c": """
#include <stdio.h>
#include "count.h"
int main(void) {
  printf("%d\\n", count(getchar));
}
""",
}


@pytest.fixture(scope="module")
def toolbox(
    runtime_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SyncClient]:
    """A client with an image "toolbox": this machine's make, C compiler and git on the base."""
    missing = [name for name in ("make", "gcc", "musl-gcc", "git") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed on this machine")
    cache = tmp_path_factory.mktemp("toolbox")
    root = cache / "root"
    shutil.copytree(rootfs.build("base", cache_dir), root, symlinks=True)
    parts = [_gcc("-print-prog-name=cc1"), _gcc("-print-prog-name=collect2")]
    programs = ["make", "gcc", "as", "ld", "git"]
    for path in [*parts, *(Path(str(shutil.which(name))) for name in programs)]:
        rootfs._copy_program(root, path, str(path))
    shutil.copy(str(shutil.which("musl-gcc")), root / "usr/bin/musl-gcc")
    # What a static program is linked from: the compiler's own parts, musl's headers and library.
    library = Path(_gcc("-print-libgcc-file-name")).parent
    for source in (library, library / "include", *Path("/usr").glob("*/*-linux-musl")):
        target = root / source.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*") if "musl" in source.name else source.glob("*.[aoh]"):
            if path.is_file() and not path.name.startswith(("liba", "libt", "libl", "libu")):
                place = root / path.relative_to("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
    (root / "usr/bin/git-upload-pack").symlink_to("git")
    (cache / "agent").symlink_to(cache_dir / "agent")
    with Store(cache / "store") as store:
        image_of_folder(store, root, "toolbox")
    with SyncClient(runtime_dir=runtime_dir, cache_dir=cache) as client:
        client.create(Container(image="toolbox")).stop()  # starts what serves all tests
        yield client


def _gcc(question: str) -> Path:
    done = subprocess.run(["gcc", question], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).resolve()


def works(sandbox: SyncSandbox, command: str) -> str:
    result = sandbox.exec(command, timeout=TIMEOUT, merge=True)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("need_root")
def test_a_c_project_is_built_and_tested_by_make(toolbox: SyncClient):
    with toolbox.create(Container(image="toolbox", memory="512MiB", pids=64)) as sandbox:
        for name, text in SOURCES.items():
            sandbox.files.write(f"project/{name}", text)
        assert "-o words" in works(sandbox, "make -C project -j2 2>&1")
        works(sandbox, "make -C project test")
        assert "up to date" in works(sandbox, "make -C project words")
        # A copy goes on where this one is, and what is wrong there is found there alone.
        (copy,) = sandbox.fork()
        with copy:
            broken = SOURCES["count.c"].replace("words = 0", "words = 1")
            copy.files.write("project/count.c", broken)
            assert copy.exec("make -C project test", timeout=TIMEOUT).exit_code == 2
        works(sandbox, "make -C project test")


@pytest.mark.usefixtures("need_root")
def test_a_git_workflow(toolbox: SyncClient):
    with toolbox.create(Container(image="toolbox")) as sandbox:
        sandbox.files.write(
            "go",
            """set -e
git config --global user.name Tenant; git config --global user.email tenant@localhost
git init -q -b main origin; cd origin
echo one > file; git add file; git commit -qm "Add a file"
cd ..; git clone -q origin copy; cd copy
git switch -qc topic; echo two >> file; git commit -qam "Say more"
git switch -q main; echo other > second; git add second; git commit -qm "Add another"
git merge -q --no-edit topic
git log --format=%s; git diff HEAD~1 --stat; git fsck --strict
""",
        )
        said = works(sandbox, "bash go 2>&1")
        assert "Merge branch 'topic'" in said
        assert "Say more" in said
        assert sandbox.files.read("copy/file") == b"one\ntwo\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """A package mirror on this machine's loopback with one wheel, and its address."""
    folder = tmp_path / "simple" / "greeting"
    folder.mkdir(parents=True)
    name = "greeting-1.0-py3-none-any.whl"
    (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')
    about = "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("greeting.py", "def greet():\n    return 'hello from a wheel'\n")
        wheel.writestr("greeting-1.0.dist-info/METADATA", about)
        wheel.writestr("greeting-1.0.dist-info/WHEEL", kind)
        wheel.writestr("greeting-1.0.dist-info/RECORD", "")
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.2", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.2:{server.server_address[1]}"
        server.shutdown()


def zipped_pip() -> bytes:
    """pip as one file, as it runs from anywhere."""
    found = importlib.util.find_spec("pip")
    if found is None or found.origin is None:
        pytest.skip("this Python has no pip")
    folder = Path(found.origin).parent
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".pem", ".txt"):
                file.write(path, Path("pip") / path.relative_to(folder))
    return data.getvalue()


@pytest.mark.usefixtures("need_root")
def test_pip_installs_from_a_mirror_that_is_allowed(
    options: dict[str, Path], substrate: str, mirror: str
):
    with SyncClient(substrate=substrate, mirrors={"pypi": mirror}, **options) as client:
        sandbox = client.create(Container(image="python"))
        sandbox.files.write("pip.zip", zipped_pip())
        install = (
            "python3 pip.zip/pip install --disable-pip-version-check --no-input --retries 0 "
            "--timeout 5 --target site greeting"
        )
        assert sandbox.exec(install, timeout=TIMEOUT).exit_code != 0, "nothing is allowed yet"
        sandbox.phase("install", net=Net.deny().mirror("pypi"))
        said = works(sandbox, install)
        assert "Successfully installed greeting-1.0" in said
        sandbox.phase("run")
        code = "import sys; sys.path.insert(0, 'site'); import greeting; print(greeting.greet())"
        assert works(sandbox, f'python3 -c "{code}"') == "hello from a wheel\n"
        asked = [entry["url"] for entry in sandbox.network_log() if entry.get("kind") == "mirror"]
        page = "/mirror/pypi/simple/greeting/"
        assert asked[0] == page
        assert all(url.startswith(page) for url in asked)
        assert any(url.endswith(".whl") for url in asked)

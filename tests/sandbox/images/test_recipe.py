"""Recipes: what each instruction does, what is refused in which line, what RUN may not do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fathom.errors import Unsupported
from fathom.sandbox.images import (
    BuildFailed,
    Image,
    Store,
    compose,
    image_of_folder,
    lookup,
    pack_folder,
    rootfs,
    tree,
)
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images.care import check, collect
from fathom.sandbox.images.dockerfile import parse
from fathom.sandbox.images.ignore import ignored
from fathom.sandbox.images.recipe import Options, build
from fathom.sandbox.paths import cache_folder
from tests.sandbox.images.listing import listing


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """A store with the built-in image, which takes a moment to pack."""
    with Store(tmp_path_factory.mktemp("shared") / "store", durable=False) as store:
        image = image_of_folder(store, rootfs.build("base", cache_folder()), "base")
        # What a command needs to try what it must not do.
        tools = tmp_path_factory.mktemp("tools")
        tools.chmod(0o755)
        for name in ("chown", "mknod", "mount", "unshare"):
            path = rootfs.find_program(name)
            assert path is not None
            rootfs._copy_program(tools, path, f"/usr/bin/{name}")
        extra = pack_folder(store, tools)
        store.put_image(Image(layers=(*image.layers, extra.digest)), "tools")
        small = tmp_path_factory.mktemp("small")
        (small / "etc").mkdir()
        (small / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nworker:x:1000:1001::/:/bin/sh\n")
        (small / "etc/group").write_text("staff:x:50:\n")
        (small / "srv").symlink_to("data/srv")
        (small / "data/srv").mkdir(parents=True)
        image_of_folder(store, small, "small")
        yield store


@pytest.fixture
def context(tmp_path: Path) -> Path:
    made = tmp_path / "context"
    (made / "app/sub").mkdir(parents=True)
    (made / "app/main.py").write_text("print('main')\n")
    (made / "app/sub/data").write_text("data")
    (made / "one.txt").write_text("one")
    (made / "two.txt").write_text("two")
    return made


def make(store: Store, recipe: str, context: Path, **options: object):
    return build(store, recipe, context, "made", Options(**options))


def names(store: Store, image) -> list[str]:
    root, _ = layering.joined(store, image.layers, bottom=True)
    return [p.decode() for p, n in tree.walk(root) if not n.is_dir]


def test_copies_need_no_privileges(shared: Store, context: Path):
    image = make(
        shared,
        """
        FROM small
        # a comment
        COPY app /opt/app
        COPY one.txt two.txt /opt/
        COPY *.txt /texts/
        ADD one.txt /renamed
        COPY --chown=worker:staff --chmod=0750 app/main.py /srv/main.py
        WORKDIR /work/here
        COPY one.txt .
        """,
        context,
    )
    assert names(shared, image) == [
        "data/srv/main.py",
        "etc/group",
        "etc/passwd",
        "opt/app/main.py",
        "opt/app/sub/data",
        "opt/one.txt",
        "opt/two.txt",
        "renamed",
        "srv",
        "texts/one.txt",
        "texts/two.txt",
        "work/here/one.txt",
    ]
    root, _ = layering.joined(shared, image.layers, bottom=True)
    node = tree.find(root, b"data/srv/main.py")
    assert node is not None
    assert (node.uid, node.gid, node.mode & 0o7777, node.mtime) == (1000, 50, 0o750, 0)
    assert lookup.read_file(shared, image, "/srv/main.py") == b"print('main')\n"
    assert image.run.workdir == "/work/here"


def test_variables_and_what_is_run(shared: Store, context: Path):
    # What a value holds sets nothing else.
    who = """1 PATH=/evil "it's" $A \\n"""
    image = make(
        shared,
        """ARG BASE=small
        FROM $BASE
        ARG BASE
        ARG WHO=nobody
        ENV A=1 B="two words" C='$A'
        ENV D ${A}-${MISSING:-none}-${A:+set}-\\$A
        ENV WHO=$WHO FROM=${BASE} IN="<$WHO>" OUT=a\\ b\\$A
        USER "worker"
        CMD ["x y", "z"]
        ENTRYPOINT ["/bin/run", "--all"]
        """,
        context,
        args={"WHO": who},
    )
    assert dict(image.run.env) == {
        "A": "1",
        "B": "two words",
        "C": "$A",
        "D": "1-none-set-$A",
        "WHO": who,
        "FROM": "small",
        "IN": f"<{who}>",
        "OUT": "a b$A",
    }
    assert image.run.entrypoint == ("/bin/run", "--all")
    assert image.run.command == ("x y", "z")
    assert image.run.user == "worker"
    above = make(shared, 'FROM made\nENTRYPOINT ["/bin/other"]', context)
    assert above.run.command == ()


def test_stages(shared: Store, context: Path):
    image = make(
        shared,
        "FROM small AS first\nCOPY app /app\nFROM small\nCOPY --from=first /app/main.py /x/\n"
        "COPY --from=0 /app /all\nCOPY --from=small --chown=7:8 /etc/passwd /copy",
        context,
    )
    assert {"x/main.py", "all/main.py", "all/sub/data", "copy"} <= set(names(shared, image))
    assert "app/main.py" not in names(shared, image)
    assert len(image.layers) == 4


def test_ignored_files(shared: Store, context: Path):
    (context / ".git").mkdir()
    (context / ".git/config").write_text("secret")
    (context / "app/x.log").touch()
    (context / ".dockerignore").write_text("# no\n.git\n**/*.log\n.dockerignore\n*.txt\n!one.txt\n")
    image = make(shared, "FROM small\nCOPY . /all", context)
    assert [n for n in names(shared, image) if n.startswith("all")] == [
        "all/app/main.py",
        "all/app/sub/data",
        "all/one.txt",
    ]
    with pytest.raises(BuildFailed, match=r"two\.txt is not in the folder"):
        make(shared, "FROM small\nCOPY two.txt /x", context)


def test_patterns_mean_what_docker_takes_them_for(tmp_path: Path):
    files = ("env1", "envx", "a.txt", "axtxt", "a/b/c.pem", "sub/x", "w-z", "#x")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for line, out in {
        "env[0-9]": {"env1"},
        "env[^0-9]": {"envx"},
        "./a.txt": {"a.txt"},
        "sub/../a.txt": {"a.txt"},
        "/a.txt/": {"a.txt"},
        "a\\.txt": {"a.txt"},
        "a?txt": {"a.txt", "axtxt"},
        "w[a\\-]z": {"w-z"},
        "**/c.pem": {"a/b/c.pem"},
        "a/**": {"a/b", "a/b/c.pem"},
        "a": {"a", "a/b", "a/b/c.pem"},
        "*\n! a.txt\r": {*files, "a", "a/b", "sub", ".dockerignore"} - {"a.txt"},
        "# comment\n #x": {"#x"},
    }.items():
        (tmp_path / ".dockerignore").write_bytes(b"\xef\xbb\xbf" + line.encode())
        assert {path[1:] for path in ignored(tmp_path)} == out, line
    for line in ("../x", "/", ".", "!", "a[", "a[]", "a[z-a]", "a[b-]", "a\\"):
        (tmp_path / ".dockerignore").write_text(f"\n{line}\n")
        with pytest.raises(BuildFailed, match=r"\.dockerignore, line 2: "):
            ignored(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("", "line 1: a recipe begins with FROM"),
        ("RUN x", "line 1: a recipe begins with FROM"),
        ("FROM small\n\nHEALTHCHECK CMD x", r"line 3: the instruction 'HEALTHCHECK' is not supp"),
        ("FROM small\nVOLUME /x", "line 2: the instruction 'VOLUME'"),
        ("FROM small\nRUN --mount=type=cache x", "line 2, RUN: the flag --mount is not supported"),
        ("FROM small\nRUN <<EOF\nx\nEOF", "line 2, RUN: text documents"),
        ("FROM small\nCOPY", "line 2, COPY: it says nothing"),
        ("FROM small\nCOPY one.txt", "line 2, COPY: write the sources"),
        ("FROM small\nCOPY ../secret /x", "line 2, COPY: ../secret leads out"),
        ("FROM small\nCOPY out/passwd /x", "line 2, COPY: out/passwd leads out .* through a link"),
        ("FROM small\nCOPY absent /x", "line 2, COPY: absent is not in the folder"),
        ("FROM small\nCOPY one.txt two.txt /x", "line 2, COPY: several sources need a folder"),
        ("FROM small\nCOPY one.txt /etc/passwd/x", "leads through a file"),
        ("FROM small\nCOPY --from=absent a /b", "line 2, COPY: --from=absent is no earlier stage"),
        ("FROM small\nCOPY --from=small /absent /b", "line 2, COPY: the image has no /absent"),
        ("FROM small\nCOPY --chown=ghost a /b", "line 2, COPY: the image has no user 'ghost'"),
        ("FROM small\nCOPY --chmod=rwx one.txt /b", "line 2, COPY: --chmod=rwx is not a mode"),
        ("FROM small\nADD http://x/y /b", "line 2, ADD: http://x/y is not a local file"),
        ("FROM small\nADD a.tar.gz /b", "line 2, ADD: a.tar.gz: ADD does not unpack"),
        ("FROM small\nUSER ghost", "line 2, USER: the image has no user 'ghost'"),
        ("FROM small\nWORKDIR /etc/passwd", "line 2, WORKDIR: /etc/passwd is a file"),
        ("FROM small\nENV A", "line 2, ENV: 'A' has no value"),
        ("FROM small\nENV 1=2", "line 2, ENV: '1' cannot name a variable"),
        ("FROM small\nENV A='x", "line 2, ENV: a quotation is not closed: A='x"),
        ("FROM small\nENV A=${B/x/y}", "is not a variable that this builder knows"),
        ("FROM small\nCMD ['x']", "line 2, CMD: the list is not JSON"),
        ("FROM small\nCMD [1]", "line 2, CMD: the list may hold only strings"),
        ("FROM absent", "line 1, FROM: no image is called 'absent'"),
        ("FROM --platform=linux/s390x small", "line 1, FROM: small is for amd64, not s390x"),
        ("FROM small extra", "line 1, FROM: write FROM image"),
        ("FROM small\nRUN x \\", "line 2: the last line ends with a backslash"),
        ("# escape=`\nFROM small", "line 1: the escape directive"),
    ],
)
def test_what_is_refused(shared: Store, context: Path, recipe: str, text: str):
    (context / "out").symlink_to("/etc")
    with pytest.raises(BuildFailed, match=text):
        make(shared, recipe, context)
    assert "made" not in shared.names() or shared.untag("made") is None
    assert list((shared.folder / "tmp").iterdir()) == []


def test_an_argument_that_is_not_there(shared: Store, context: Path):
    with pytest.raises(BuildFailed, match="the recipe has no ARG TYPO"):
        make(shared, "FROM small\nARG A", context, args={"TYPO": "1"})


def test_lines_are_counted_from_where_an_instruction_begins():
    found = parse("# x\nFROM a\n\nRUN one \\\n  # inside\n  && two\nCMD x")
    assert [(one.line, one.name, one.text) for one in found] == [
        (2, "FROM", "a"),
        (4, "RUN", "one   && two"),
        (7, "CMD", "x"),
    ]


def test_what_a_command_says_is_left_as_it_is():
    found = parse('\ufeffFROM a\r\n\tRUN\techo "a\tb  \\ \n  # no\n   c\x0cd" \\\\ \nUSER x')
    assert [one.text for one in found] == ["a", 'echo "a\tb     c\x0cd" \\\\', "x"]


RUN = """FROM tools
ENV GREETING=hello
RUN echo "$GREETING" > /root/said && mkdir -p /opt/x && chown 1000:1000 /opt/x \\
    && ln -s said /root/link && rm /etc/hosts
USER user
WORKDIR /opt/x
RUN id -u > who; pwd > where
"""


def test_commands_run_in_a_container(need_root, shared: Store, context: Path, tmp_path: Path):
    image = make(shared, RUN, context)
    (tmp_path / "m").mkdir()
    with compose(shared, image, tmp_path / "m") as stack:
        root = stack.root
        assert (root / "root/link").read_text() == "hello\n"
        assert (root / "opt/x/who").read_text() == "1000\n"
        assert (root / "opt/x/where").read_text() == "/opt/x\n"
        assert (root / "opt/x/who").stat().st_uid == 1000
        assert (root / "root/said").stat().st_uid == 0
        assert not (root / "etc/hosts").exists()
        assert sorted(os.listdir(root / "dev")) == []
    # The same recipe again runs nothing; without what is remembered it gives the same digest.
    assert make(shared, RUN, context) == image
    assert make(shared, RUN, context, cache=False) == image
    assert check(shared) == []


def test_a_change_repeats_only_what_comes_after_it(need_root, shared: Store, context: Path):
    first = make(shared, RUN, context)
    second = make(shared, RUN.replace("pwd > where", "pwd > elsewhere"), context)
    assert first.layers[:-1] == second.layers[:-1]
    assert first.layers[-1] != second.layers[-1]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("echo some words; exit 3", "line 2, RUN: the command ended with 3: some words"),
        ("sleep 30", "line 2, RUN: it took longer than 3.0 seconds"),
        ("sleep 30 & exit 9", "the command ended with 9"),
        ("yes | head -c 50000000; exit 4", "the command ended with 4"),
        ("cat /proc/kcore > /dev/null", "the command ended with 1"),
        ("mount -t tmpfs x /tmp", "the command ended with"),
        ("unshare -Urm true", "unshare: .*Operation not permitted"),
        ("exec 2>&1; : < /dev/tcp/127.0.0.1/22", "Connection refused|unreachable"),
        ("mknod /tmp/disk b 8 0", "Operation not permitted"),
        ("chown 70000 /tmp", "Invalid argument"),
        ("echo 1 > /proc/sys/kernel/panic", "Read-only|Permission denied"),
        ("head -c 200M /dev/zero | tail -c 1G | wc -c | grep -q 2097152", "ended with|longer"),
        ("[ $(ls -d /proc/[0-9]* | wc -l) -gt 20 ]", "the command ended with 1"),
        ("[ -e /sys/fs/cgroup ] || [ -e /run/fathom ]", "the command ended with 1"),
    ],
)
def test_what_a_command_cannot_do(need_root, shared: Store, context: Path, command: str, text: str):
    before = set(shared.names())
    with pytest.raises(BuildFailed, match=text):
        make(shared, f"FROM tools\nRUN {command}", context, timeout=3.0, memory=64 << 20)
    assert set(shared.names()) == before
    assert list((shared.folder / "tmp").iterdir()) == []


def test_a_command_leaves_the_layers_below_as_they_are(need_root, shared: Store, context: Path):
    base = rootfs.build("base", cache_folder())
    before = listing(base)
    make(shared, "FROM base\nRUN rm -rf /usr/share /etc/passwd; echo x > /etc/group", context)
    assert listing(base) == before
    assert check(shared) == []


def test_a_build_is_kept_by_its_name(need_root, shared: Store, context: Path):
    image = make(shared, RUN, context)
    collect(shared)
    assert shared.resolve("made") == image
    assert check(shared) == []


def test_commands_need_root(shared: Store, context: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(Unsupported, match="RUN needs root"):
        make(shared, "FROM small\nRUN something new", context)

"""Sandboxes for the tests, and the proof after each test that nothing of them is left."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fathom.sandbox import Container, Sandbox, Snapshot, SyncClient, SyncSandbox
from fathom.sandbox.cgroups import PARENT
from fathom.sandbox.paths import cache_folder
from fathom.sandbox.substrates.choice import program_of, suited

Traces = Callable[..., set[str]]


@pytest.fixture(scope="session")
def runtime_dir() -> Iterator[Path]:
    """A folder for live sandboxes that other users can pass but that no other process uses."""
    name = f"fathom-test-{os.getpid()}"
    folder = Path("/run" if os.geteuid() == 0 else "/tmp", name)
    yield folder
    assert not folder.exists() or not list(folder.iterdir())
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The folder of images; the user's own, so that they are built once."""
    return cache_folder()


@pytest.fixture(scope="session", autouse=True)
def no_snapshots_left(cache_dir: Path) -> Iterator[None]:
    """What these tests keep, machines among it, is large: it goes, and nobody else's does."""
    made: list[str] = []
    whole = Sandbox.snapshot

    @functools.wraps(whole)
    async def snapshot(self: Sandbox) -> Snapshot:
        kept = await whole(self)
        made.append(kept.id)
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sandbox, "snapshot", snapshot)
        yield
    for id_ in made:
        shutil.rmtree(cache_dir / "snapshots" / id_, ignore_errors=True)


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> str:
    """The first substrate that is installed; tests of isolation go through all of them."""
    names = [request.param] if hasattr(request, "param") else suited()
    for name in names:
        if program_of(name):
            return name
    pytest.skip(f"{' and '.join(names)} not installed")


@pytest.fixture
def options(runtime_dir: Path, cache_dir: Path) -> dict[str, Path]:
    return {"runtime_dir": runtime_dir, "cache_dir": cache_dir}


@pytest.fixture
def client(substrate: str, options: dict[str, Path]) -> Iterator[SyncClient]:
    with SyncClient("local", substrate=substrate, **options) as made:
        yield made
        # Its node's; they would be gone with the node.
        deadline = time.monotonic() + 5
        while left := zombies():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)


@pytest.fixture
def sandbox(client: SyncClient) -> SyncSandbox:
    return client.create(Container())


@pytest.fixture(scope="module")
def shared(runtime_dir: Path, cache_dir: Path) -> Iterator[SyncSandbox]:
    """One sandbox for all tests of a module that leave no mark on it."""
    with SyncClient("local", runtime_dir=runtime_dir, cache_dir=cache_dir) as made:
        yield made.create(Container())


@pytest.fixture
def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def traces(runtime_dir: Path, cache_dir: Path) -> Traces:
    """What sandboxes of these tests have on this machine right now."""

    def find(nodes: bool = False) -> set[str]:
        found = {f"folder {path}" for path in _children(runtime_dir)}
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found |= {f"mount {line}" for line in mounts if str(runtime_dir) in line}
        # Names carry the process id of their owner, so sandboxes of others are not counted.
        name = f"sb-{os.getpid()}-*"
        for pattern in (f"*/{PARENT}/{name}", f"{PARENT}/{name}"):
            found |= {f"group {path}" for path in Path("/sys/fs/cgroup").glob(pattern)}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and (owner := _owner(process, runtime_dir, cache_dir)):
                if nodes or not owner.startswith("node"):
                    found.add(f"process of {owner}")
        return found

    return find


def zombies() -> list[str]:
    """The processes that have ended below this one's and that nobody waited for."""
    table: dict[int, tuple[int, str, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:
            continue
        state, parent = tail.split()[:2]
        table[int(path.parent.name)] = int(parent), state, head.partition("(")[2]
    ours = {os.getpid()}
    for _ in range(4):  # a node is a child, of a daemon that is one
        ours |= {pid for pid, (parent, _, _) in table.items() if parent in ours}
    return [
        f"{pid} ({name}) of {parent}"
        for pid, (parent, state, name) in table.items()
        # What a tenant's own processes do not wait for is another matter.
        if state == "Z" and parent in ours and _is_node(parent)
    ]


def _is_node(pid: int) -> bool:
    try:
        return b"fathom.sandbox.node" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _owner(process: Path, runtime_dir: Path, cache_dir: Path) -> str | None:
    """Name the sandbox to which a process belongs, None for all other processes."""
    try:
        arguments = (process / "cmdline").read_bytes().decode().split("\0")
        mounts = (process / "mountinfo").read_text()
        session = os.getsid(int(process.name))
        groups = (process / "cgroup").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    if found := re.search(rf"sb-{os.getpid()}-\w+", groups):
        return found[0]
    if found := re.search(rf"{runtime_dir}/(sb-\w+-\w+)", mounts):
        return found[1]
    if any("fathom.sandbox.node" in text for text in arguments):
        # It has the process id of its owner as an argument, and lives as long as its client.
        return f"node {session}" if str(os.getpid()) in arguments else None
    # Without root the folder of images is one that these tests alone use.
    return "a tenant" if os.geteuid() and f"{cache_dir}/images" in mounts else None


@pytest.fixture(autouse=True)
def nothing_left(traces: Traces) -> Iterator[None]:
    """After every test: no process, mount, control group, folder or descriptor is left."""
    descriptors = len(os.listdir("/proc/self/fd"))
    before = traces(nodes=True)
    yield
    # What another test's subprocess started may need a moment to see that its client is gone.
    for _ in range(100):
        if not traces(nodes=True) - before:
            break
        time.sleep(0.05)
    assert traces(nodes=True) - before == set()
    assert len(os.listdir("/proc/self/fd")) <= descriptors

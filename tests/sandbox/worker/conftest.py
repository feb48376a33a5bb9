"""A daemon for the runs of these tests, and a state folder of each test's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from fathom.sandbox.substrates.choice import program_of
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.worker.worker import PLAN, Worker
from tests.sandbox.edge.daemon import Daemon


@pytest.fixture(scope="module")
def node(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The daemon, which these tests kill and start again; it keeps nothing when they are done."""
    if os.geteuid() != 0:
        pytest.skip("a worker needs layers and a door, which only root's sandboxes have")
    if not (program_of("crun") or program_of("runc")):
        pytest.skip("crun and runc not installed")
    runs = tmp_path_factory.getbasetemp()
    made = Daemon(Path(f"/run/fathom-worker-test-{os.getpid()}"), cache_dir, work=runs)
    made.start(most=64)
    yield made
    with made.client() as client:
        left = [entry["id"] for entry in client.list()]
        for name in left:
            client.attach(name).stop()
    made.end(signal.SIGTERM)
    assert left == []
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The runs of a test; no attendant and no sandbox is left when it ends."""
    made = Store(tmp_path / "runs", durability="process")
    yield made
    for path in made.folder.glob(f"*/{PLAN}"):
        anyio.run(Worker(path.parent.name, made).stop)

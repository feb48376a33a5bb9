"""Virtual machines for the tests, one node a module; and the reason where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.sandbox import MicroVM, SyncClient, SyncSandbox
from tests.machines import skip_without_machines

# Enough for one program at a time, and as little to save and to copy as there can be.
SPEC = MicroVM(memory="160MiB", disk="32MiB")


@pytest.fixture(scope="session")
def need_machines(cache_dir: Path) -> None:
    """Skip where no virtual machine can be run, and say what is missing."""
    skip_without_machines(cache_dir)


@pytest.fixture(scope="module")
def machines(need_machines: None, runtime_dir: Path, cache_dir: Path) -> Iterator[SyncClient]:
    """One client for all tests of a module: its node holds the template's memory."""
    with SyncClient("local", runtime_dir=runtime_dir, cache_dir=cache_dir) as made:
        # Otherwise the first test would be blamed for a node that it leaves.
        made.create(SPEC).stop()
        yield made


@pytest.fixture(scope="module")
def shared_machine(machines: SyncClient) -> SyncSandbox:
    """One machine for all tests of a module that leave no mark on it."""
    return machines.create(SPEC)


@pytest.fixture
def machine(machines: SyncClient) -> Iterator[SyncSandbox]:
    """A machine of the test's own."""
    with machines.create(SPEC) as made:
        yield made

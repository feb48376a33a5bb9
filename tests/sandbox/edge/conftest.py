"""Daemons for the tests, and their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.edge.daemon import Daemon


def _folder(name: str) -> Path:
    return Path("/run" if os.geteuid() == 0 else "/tmp") / f"fathom-{name}-test-{os.getpid()}"


@pytest.fixture
def daemon(cache_dir: Path) -> Iterator[Daemon]:
    made = Daemon(_folder("edge"), cache_dir)
    made.start()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def far(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that listens for clients elsewhere; one for the tests of a module."""
    made = Daemon(_folder("far"), cache_dir, tls=tmp_path_factory.mktemp("tls"))
    made.start(most=24)
    yield made
    made.remove()

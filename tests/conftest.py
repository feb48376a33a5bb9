"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

from tests import remains

# A loaded machine must not fail a property, and what CI finds must be found again.
settings.register_profile("fathom", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fathom")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of this checkout."""
    return ROOT


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The ground-truth vectors: in $FATHOM_VECTORS, or in shared/vectors beside the checkout."""
    stated = os.environ.get("FATHOM_VECTORS")
    folder = Path(stated) if stated else ROOT.parent / "shared" / "vectors"
    if not folder.is_dir():
        pytest.skip(f"no ground-truth vectors: {folder} is not there (set FATHOM_VECTORS)")
    return folder


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Tests must not depend on the order in which workers run them."""
    random.seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; importing torch only when it matters."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """After an interrupted run as well: its workers' fixtures did not come to their ends."""
    if not hasattr(config, "workerinput"):
        remains.sweep()

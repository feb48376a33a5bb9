"""The engine's tests run on every device that there is."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the model lies: compiled rows serve it on the CPU, stored formats on a GPU."""
    return request.param

"""Fixtures of all tests of kernels."""

from __future__ import annotations

from tests.kernels.poison import _poison  # noqa: F401  (a fixture that applies by itself)

"""Whether this machine runs virtual machines, for tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox.vm import emulator, kernel


def skip_without_machines(cache_dir: Path) -> None:
    """Skip where no virtual machine can be run, and say what is missing."""
    if os.geteuid() != 0:
        pytest.skip("virtual machines need root")
    if emulator.program() is None:
        pytest.skip(f"QEMU is not installed: {emulator.INSTALL}")
    try:
        kernel.find(cache_dir)
    except SandboxError as error:
        pytest.skip(f"no kernel for the guest: {error}")

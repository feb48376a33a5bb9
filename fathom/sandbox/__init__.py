"""Sandboxes: own root filesystem, no network, limits, and nothing left behind.

Names are loaded on first use, so that the node process, which needs none of them, starts quickly.

Paper: §5.2.5.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom.sandbox.client import Client, Group
    from fathom.sandbox.files import FileInfo, SandboxFileIsFolder, SandboxFileMissing
    from fathom.sandbox.fn import FnResult, Functions
    from fathom.sandbox.net import Net
    from fathom.sandbox.process import Ended, Process
    from fathom.sandbox.sandbox import Receipt, Sandbox
    from fathom.sandbox.sync import SyncClient, SyncFunctions, SyncGroup, SyncProcess, SyncSandbox
    from fathom.sandbox.types import (
        Caps,
        Container,
        ExecResult,
        Fn,
        FullVM,
        MicroVM,
        Snapshot,
        Spilled,
        Stats,
    )
    from fathom.sandbox.worker.sync import SyncWorker
    from fathom.sandbox.worker.worker import Loop, Worker

_HOMES = {
    "Caps": "types",
    "Client": "client",
    "Container": "types",
    "Ended": "process",
    "ExecResult": "types",
    "FileInfo": "files",
    "Fn": "types",
    "FnResult": "fn",
    "FullVM": "types",
    "Functions": "fn",
    "Group": "client",
    "Loop": "worker.worker",
    "MicroVM": "types",
    "Net": "net",
    "Process": "process",
    "Receipt": "sandbox",
    "Sandbox": "sandbox",
    "SandboxFileIsFolder": "files",
    "SandboxFileMissing": "files",
    "Snapshot": "types",
    "Spilled": "types",
    "Stats": "types",
    "SyncClient": "sync",
    "SyncFunctions": "sync",
    "SyncGroup": "sync",
    "SyncProcess": "sync",
    "SyncSandbox": "sync",
    "SyncWorker": "worker.sync",
    "Worker": "worker.worker",
}

__all__ = [
    "Caps",
    "Client",
    "Container",
    "Ended",
    "ExecResult",
    "FileInfo",
    "Fn",
    "FnResult",
    "FullVM",
    "Functions",
    "Group",
    "Loop",
    "MicroVM",
    "Net",
    "Process",
    "Receipt",
    "Sandbox",
    "SandboxFileIsFolder",
    "SandboxFileMissing",
    "Snapshot",
    "Spilled",
    "Stats",
    "SyncClient",
    "SyncFunctions",
    "SyncGroup",
    "SyncProcess",
    "SyncSandbox",
    "SyncWorker",
    "Worker",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

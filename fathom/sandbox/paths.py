"""Where sandboxes keep their files: the only place of this package that reads the environment.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import SandboxError


def cache_folder() -> Path:
    """Return the folder of built images, $XDG_CACHE_HOME/fathom or ~/.cache/fathom."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "fathom" if base else Path("~/.cache/fathom").expanduser()


def state_folder() -> Path:
    """Return the folder of what shall outlive a restart, $XDG_STATE_HOME/fathom or its default."""
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base) / "fathom" if base else Path("~/.local/state/fathom").expanduser()


def trajectory_folder() -> Path:
    """Return the folder of this user's trajectories."""
    return state_folder() / "trajectories"


def runtime_folder() -> Path:
    """Return the folder of live sandboxes: /run/fathom for root, else one of the user's own."""
    if os.geteuid() == 0:
        return Path("/run/fathom")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        return Path(base) / "fathom"
    return Path(f"/tmp/fathom-{os.geteuid()}")


def edge_folder() -> Path:
    """Return the folder of this user's daemon, beside that of live sandboxes."""
    folder = runtime_folder()
    return folder.with_name(f"{folder.name}-edge")


def token_file() -> Path:
    """Return the file of this user's tokens for the daemon."""
    return state_folder() / "edge-tokens.json"


@dataclass(frozen=True, slots=True)
class Far:
    """A daemon elsewhere, as `Client` takes it."""

    url: str
    token: str | None
    ca: str | None
    fingerprint: str | None


def far_daemon() -> Far | None:
    """Return the daemon that FATHOM_SANDBOX_URL, _TOKEN, _CA and _FINGERPRINT name, if any."""
    given = {
        name: os.environ.get(f"FATHOM_SANDBOX_{name.upper()}") or None
        for name in ("url", "token", "ca", "fingerprint")
    }
    url = given.pop("url")
    return None if url is None else Far(url, **given)


def make_runtime_folder(folder: Path) -> Path:
    """Create `folder` and prove that nobody else could have prepared it. Raises SandboxError."""
    folder = folder.absolute()
    root = os.geteuid() == 0
    # A tenant of root's sandboxes is another user and must be able to pass through, not to list.
    mode = 0o711 if root else 0o700
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SandboxError(
            f"the runtime folder {folder} cannot be made ({error.strerror}): give another one with "
            "runtime_dir="
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SandboxError(
            f"the runtime folder {folder} belongs to somebody else or others may write to it: "
            "remove it or give another one with runtime_dir="
        )
    if root:
        for parent in (folder, *folder.parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                raise SandboxError(
                    f"the runtime folder {folder} is behind {parent}, which other users cannot "
                    "pass: give another one with runtime_dir="
                )
    return folder

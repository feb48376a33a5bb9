"""Says what went wrong with the machine, where a plain OSError would only carry a number.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager

from fathom.errors import MachineFull, SandboxError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def explain(error: OSError, doing: str) -> SandboxError:
    """Return the error to raise instead of what the system said."""
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    said = f"{error.strerror or error}{where}"
    if error.errno in _FULL:
        return MachineFull(
            f"this machine has no room left to {doing}: {said}; make some, try again"
        )
    return SandboxError(f"this machine could not {doing}: {said}; `fathom doctor` may tell more")


@contextmanager
def telling(doing: str) -> Generator[None]:
    """Raise a SandboxError for each OSError inside."""
    try:
        yield
    except OSError as error:
        raise explain(error, doing) from error

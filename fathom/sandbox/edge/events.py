"""Log lines of the daemon: an event's name and fields, none of which can pretend to be another.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import json
import logging
import re

_PLAIN = re.compile(r"[A-Za-z0-9_./:@+-]{1,200}")


def event(log: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log one event as key=value; what is not plain text is quoted, what is long is cut."""
    if log.isEnabledFor(level):
        parts = [f"event={event}", *(f"{key}={_value(value)}" for key, value in fields.items())]
        log.log(level, "%s", " ".join(parts))


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text[:500])

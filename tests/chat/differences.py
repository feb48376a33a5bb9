"""The deliberate differences that docs/protocol.md lists, so that tests can hold them to it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
_TITLE = "## Deliberate differences"


def listed(prefix: str) -> set[str]:
    """Names of the vectors, beginning with `prefix`, that the page lists with a reason."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(_TITLE, 1)[1].split("\n## ", 1)[0]
    names: set[str] = set()
    for row in re.findall(r"^\| (`.+`) \| (.+) \|$", section, re.MULTILINE):
        assert len(row[1]) > 20, f"{row[0]} needs a reason"
        names.update(re.findall(r"`([^`]+)`", row[0]))
    return {name for name in names if name.startswith(prefix)}

"""Stop strings in text that arrives in pieces.

Paper: none (API conventions).
"""

from __future__ import annotations

import re


class StopFinder:
    """Passes text on until one of `strings` appears in it.

    The end of the text is held back while it may be the beginning of a stop string. They count in
    the visible answer alone: a thought or an argument that mentions one is no reason to stop.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.found: str | None = None
        longest_first = sorted(strings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._prefixes = {s[:size] for s in strings for size in range(1, len(s))}
        self._longest = max(map(len, strings)) - 1
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text, return what can be shown. After a hit, nothing more can."""
        if self.found is not None:
            return ""
        text = self._held + text
        hit = self._pattern.search(text)
        if hit:
            self.found, self._held = hit[0], ""
            return text[: hit.start()]
        size = next(
            (n for n in range(min(self._longest, len(text)), 0, -1) if text[-n:] in self._prefixes),
            0,
        )
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def flush(self) -> str:
        """The held end, when no more text comes."""
        text, self._held = self._held, ""
        return text

"""Stop texts, found across the borders of pieces.

Paper: none (a matter of the API).
"""

from __future__ import annotations

from collections.abc import Iterable


class StopFinder:
    """Lets text through until one of the stop texts is complete.

    The one that is complete first counts; of several complete at once, the longest. What may be
    the beginning of one is held back.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._hold: str = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what may go out."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text = self._hold + text
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            end, negative_size = min(ends)
            start = end + negative_size
            self._hold, self.found = "", text[start:end]
            return text[:start]
        size = max(_held_size(text, stop) for stop in self._stops)
        self._hold = text[len(text) - size :]
        return text[: len(text) - size]

    def flush(self) -> str:
        """End the text and return what was held back."""
        text, self._hold = self._hold, ""
        return text


def _held_size(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

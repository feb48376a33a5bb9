"""Reading the fields of a JSON object, with errors that name the field.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

from fathom.chat.messages import as_mapping
from fathom.errors import RequestError


class Fields:
    """The fields of one JSON object. Each is taken at most once; `unknown` names the rest."""

    def __init__(self, value: object, path: str = "") -> None:
        """Take the object at `path`. Raises RequestError if it is none."""
        mapping = as_mapping(value)
        if mapping is None:
            raise RequestError(f"must be an object, not {_kind(value)}", path or None)
        self.mapping: Mapping[str, Any] = mapping
        self._path = path
        self._taken: set[str] = set()

    def path(self, name: str) -> str:
        """Return the full name of a field."""
        return f"{self._path}.{name}" if self._path else name

    @property
    def here(self) -> str:
        """Full name of the object itself."""
        return self._path

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise RequestError about a field; the empty name is the object itself."""
        raise RequestError(message, (self.path(name) if name else self._path) or None)

    def ignore(self, names: Iterable[str]) -> None:
        """Count fields as taken without looking at them."""
        self._taken.update(names)

    def unknown(self) -> list[str]:
        """Return the names of the fields that nobody took and that say something."""
        return [
            name
            for name, value in self.mapping.items()
            if name not in self._taken and value not in (None, [], {}, "", False, 0)
        ]

    def take(self, name: str) -> Any:
        """Return a field as it is, None if it is missing."""
        self._taken.add(name)
        return self.mapping.get(name)

    def text(self, name: str) -> str | None:
        """Return a text, None if it is missing or null."""
        value = self.take(name)
        if value is None or isinstance(value, str):
            return value
        self.fail(name, f"must be text, not {_kind(value)}")

    def required_text(self, name: str) -> str:
        """Return a text that must be there."""
        value = self.text(name)
        if value is None:
            self.fail(name, "is missing: a text is needed")
        return value

    def boolean(self, name: str) -> bool | None:
        """Return true or false, None if it is missing or null."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return value
        self.fail(name, f"must be true or false, not {_kind(value)}")

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`, None if it is missing or null."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(name, f"must be a whole number from {low} to {high}: got {_short(value)}")
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """Return a number from `low` to `high`, None if it is missing; `above` excludes `low`."""
        value = self.take(name)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high or (above and value == low):
            first = "above" if above else "from"
            self.fail(name, f"must be a number {first} {low} to {high}: got {_short(value)}")
        return float(value)

    def items(self, name: str) -> list[Any] | None:
        """Return a list, None if it is missing or null."""
        value = self.take(name)
        if value is None or isinstance(value, list):
            return cast("list[Any] | None", value)
        self.fail(name, f"must be a list, not {_kind(value)}")

    def objects(self, name: str) -> list[Fields]:
        """Return a list of objects, an empty one if it is missing or null."""
        return [
            Fields(item, f"{self.path(name)}[{at}]")
            for at, item in enumerate(self.items(name) or [])
        ]

    def object(self, name: str) -> Fields | None:
        """Return an object, None if it is missing or null."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def choice(self, name: str, known: Iterable[str]) -> str | None:
        """Return a text out of `known`, None if it is missing or null."""
        value = self.text(name)
        options = tuple(known)
        if value is not None and value not in options:
            self.fail(name, f"must be one of {', '.join(options)}: got {_short(value)}")
        return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {"str": "text", "list": "a list", "dict": "an object", "bool": "true or false"}.get(
        type(value).__name__, "a number" if isinstance(value, int | float) else "that"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

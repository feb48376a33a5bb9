"""Read a Dockerfile, or rather the part of its language that this builder knows.

FROM (with AS), ARG, ENV, RUN, COPY and ADD of local files, WORKDIR, USER, ENTRYPOINT, CMD.
Everything else is an error that names its line: a recipe that is half understood makes a wrong
image.

Paper: none (recipes of container images).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fathom.sandbox.images.errors import BuildFailed

KNOWN = ("FROM", "ARG", "ENV", "RUN", "COPY", "ADD", "WORKDIR", "USER", "ENTRYPOINT", "CMD")
_FLAG = re.compile(r"--([a-z]+)(?:=(\S*))?\s*")
_FLAGS = {"FROM": {"platform"}, "COPY": {"from", "chown", "chmod"}, "ADD": {"chown", "chmod"}}
# What a blank may be in: quotes, or after a backslash.
_WORD = re.compile(r"""(?:\\.|\\\Z|'[^']*'|"(?:\\.|[^"\\])*"|[^\s'"\\])+""")
# A backslash before it would make it an ordinary one.
_CONTINUED = re.compile(r"(?<!\\)\\[ \t]*\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIZE_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction: its line (counted from 1), its name, flags, and the text after them."""

    line: int
    name: str
    flags: Mapping[str, str]
    text: str

    def fail(self, problem: str) -> BuildFailed:
        """Return an error that names the line of this instruction."""
        return BuildFailed(f"line {self.line}, {self.name}: {problem}")

    def words(self) -> tuple[str, ...]:
        """Return the words of a JSON list, or those of plain text with their quotes.

        Raises BuildFailed.
        """
        if self.text.startswith("["):
            return self._list()
        found = tuple(_WORD.findall(self.text))
        if _WORD.sub("", self.text).strip():
            raise self.fail(f"a quotation is not closed: {self.text[:80]}")
        return found

    def command(self) -> tuple[str, ...]:
        """Return a command: a JSON list as it is, other text for the shell. Raises BuildFailed."""
        if self.text.startswith("["):
            try:
                return self._list()
            except BuildFailed:
                # `[` is also a command; for CMD and ENTRYPOINT a slip of the quotes is likelier.
                if self.name != "RUN":
                    raise
        return ("/bin/sh", "-c", self.text)

    def _list(self) -> tuple[str, ...]:
        try:
            found: object = json.loads(self.text)
        except ValueError as error:
            raise self.fail(f"the list is not JSON, strings need double quotes: {error}") from error
        if not isinstance(found, list) or not all(isinstance(w, str) for w in found):  # type: ignore[reportUnknownVariableType]
            raise self.fail("the list may hold only strings")
        return tuple(str(word) for word in found)  # type: ignore[reportUnknownArgumentType]


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile. Raises BuildFailed, which names the line."""
    if len(text) > _SIZE_LIMIT:
        raise BuildFailed(f"the recipe is larger than {_SIZE_LIMIT} characters")
    found: list[Instruction] = []
    for line, content in _joined_lines(text):
        name, *rest = content.split(None, 1)
        found.append(_instruction(line, name, rest[0] if rest else ""))
    first = next((one for one in found if one.name != "ARG"), None)
    if first is None or first.name != "FROM":
        line = first.line if first else 1
        raise BuildFailed(f"line {line}: a recipe begins with FROM (only ARG may come before it)")
    return found


def _joined_lines(text: str) -> list[tuple[int, str]]:
    """Return every instruction as one line, with the number of the line where it begins.

    Its text stays as it is: blanks and tabs may be within quotes.
    """
    found: list[tuple[int, str]] = []
    parts: list[str] = []
    begun = 0
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = raw.removesuffix("\r")
        bare = line.strip()
        if re.match(r"#\s*escape\s*=", bare) and not found and not parts:
            raise BuildFailed(f"line {number}: the escape directive is not supported")
        if not bare or bare.startswith("#"):
            continue
        begun = begun or number
        if end := _CONTINUED.search(line):
            parts.append(line[: end.start()])
            continue
        found.append((begun, "".join((*parts, line)).strip()))
        parts, begun = [], 0
    if parts:
        raise BuildFailed(f"line {begun}: the last line ends with a backslash")
    return found


def _instruction(line: int, word: str, rest: str) -> Instruction:
    name = word.upper()
    if name not in KNOWN:
        raise BuildFailed(
            f"line {line}: the instruction {word[:40]!r} is not supported; this builder knows "
            f"{', '.join(KNOWN)}"
        )
    flags: dict[str, str] = {}
    while match := _FLAG.match(rest):
        flag = match[1]
        if flag not in _FLAGS.get(name, set()) or match[2] is None:
            raise BuildFailed(f"line {line}, {name}: the flag --{flag} is not supported")
        flags[flag] = match[2]
        rest = rest[match.end() :]
    one = Instruction(line=line, name=name, flags=flags, text=rest)
    if not rest:
        raise one.fail("it says nothing")
    if name in ("RUN", "COPY", "ADD") and re.search(r"<<-?['\"]?\w+", rest):
        raise one.fail("text documents (<<) are not supported")
    return one


def pairs(one: Instruction, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the names and values of ENV: `A=1 B="x y"`, or the old form `A text`.

    Variables are replaced word by word: what one holds is never split or unquoted again.
    """
    first = one.text.split(None, 1)
    if "=" not in first[0]:
        if len(first) != 2:
            raise one.fail(f"{first[0]!r} has no value")
        return [(_name(one, first[0], values), expand(one, first[1], values))]
    found: list[tuple[str, str]] = []
    for word in one.words():
        name, equals, value = word.partition("=")
        if not equals:
            raise one.fail(f"{word!r} has no value")
        found.append((_name(one, name, values), expand(one, value, values)))
    return found


def argument(one: Instruction, values: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the name and default of ARG."""
    words = one.words()
    if len(words) != 1:
        raise one.fail("one name is expected, or one name=value")
    name, equals, value = words[0].partition("=")
    return _name(one, name, values), expand(one, value, values) if equals else None


def _name(one: Instruction, text: str, values: Mapping[str, str]) -> str:
    name = expand(one, text, values)
    if not _NAME.fullmatch(name):
        raise one.fail(f"{name!r} cannot name a variable")
    return name


def expand(one: Instruction, text: str, values: Mapping[str, str]) -> str:
    """Replace `$NAME`, `${NAME}`, `${NAME:-other}`, `${NAME:+other}` and remove quotes.

    Nothing is replaced within single quotes or after a backslash, and what comes from a variable
    stays as it is. Raises BuildFailed.
    """
    out: list[str] = []
    position = 0
    quote = ""
    while position < len(text):
        character = text[position]
        following = text[position + 1 : position + 2]
        position += 1
        if quote == "'" and character != "'":
            out.append(character)
        elif character == "\\" and following:
            # Within double quotes a backslash means nothing before most characters.
            out.append(following if not quote or following in '"$\\' else character + following)
            position += 1
        elif character in ("'", '"') and quote in ("", character):
            quote = "" if quote else character
        elif character == "$":
            value, position = _variable(one, text, position, values)
            out.append(value)
        else:
            out.append(character)
    if quote:
        raise one.fail(f"a quotation is not closed: {text[:80]}")
    return "".join(out)


def _variable(
    one: Instruction, text: str, position: int, values: Mapping[str, str]
) -> tuple[str, int]:
    if text[position : position + 1] != "{":
        match = _NAME.match(text, position)
        if not match:
            return "$", position
        return values.get(match[0], ""), match.end()
    end = text.find("}", position)
    match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)(?::([-+])(.*))?", text[position + 1 : end])
    if end < 0 or not match:
        raise one.fail(f"{text[position - 1 :][:40]!r} is not a variable that this builder knows")
    value = values.get(match[1], "")
    if match[2] == "-" and not value:
        value = expand(one, match[3], values)
    elif match[2] == "+":
        value = expand(one, match[3], values) if value else ""
    return value, end + 1

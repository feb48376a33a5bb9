"""What `.dockerignore` keeps out of an image, as Docker reads it, or an error that names the line.

A pattern that is misread keeps nothing out: then a secret that somebody took care to leave behind
lies in an image. So what is not understood is refused.

Paper: none (recipes of container images).
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from fathom.sandbox.images.errors import BuildFailed

FILE = ".dockerignore"


def ignored(context: Path) -> frozenset[str]:
    """Return the files and folders of `context` that are left out; each begins with a slash.

    Raises BuildFailed for a pattern that cannot be understood.
    """
    file = context / FILE
    if not file.is_file():
        return frozenset()
    rules = _rules(os.fsdecode(file.read_bytes().removeprefix(b"\xef\xbb\xbf")))
    found: set[str] = set()
    for folder, folders, files in os.walk(context):
        for name in (*folders, *files):
            path = str(Path(folder, name).relative_to(context))
            out = False
            for kept, rule in rules:
                if rule.match(path):
                    out = not kept
            if out:
                found.add(f"/{path}")
    # A folder of which something is kept cannot be left out as a whole.
    return frozenset(p for p in found if not _has_kept(context, p, found))


def _has_kept(context: Path, path: str, found: set[str]) -> bool:
    folder = context / path[1:]
    if not folder.is_dir() or folder.is_symlink():
        return False
    return any(
        f"/{below.relative_to(context)}" not in found
        for below in folder.rglob("*")
        if not below.is_dir()
    )


def _rules(text: str) -> list[tuple[bool, re.Pattern[str]]]:
    """Return whether each line keeps what it names, and what it names; the last match counts."""
    rules: list[tuple[bool, re.Pattern[str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        pattern = line.strip()
        if not pattern or line.startswith("#"):
            continue
        kept = pattern.startswith("!")
        try:
            rules.append((kept, _compile(pattern[kept:].strip())))
        except (ValueError, re.error) as error:
            raise BuildFailed(f"{FILE}, line {number}: {pattern[:80]!r}: {error}") from error
    return rules


def _compile(pattern: str) -> re.Pattern[str]:
    """Return what matches a path that the pattern names, or one below it. Raises ValueError."""
    text = posixpath.normpath(pattern).lstrip("/") if pattern else ""
    if text in ("", "."):
        raise ValueError("this names no file; write * for everything")
    if text.split("/")[0] == "..":
        raise ValueError("this leads out of the folder of the recipe")
    out, at = "", 0
    while at < len(text):
        if text.startswith("**", at):
            at += 2
            if text.startswith("/", at):
                at += 1
                out += "(?:.*/)?"
            else:
                out += ".*"
            continue
        if text[at] == "[":
            part, at = _class(text, at)
        elif text[at] == "\\":
            if at + 1 == len(text):
                raise ValueError("nothing follows the backslash")
            part, at = re.escape(text[at + 1]), at + 2
        else:
            part, at = {"*": "[^/]*", "?": "[^/]"}.get(text[at]) or re.escape(text[at]), at + 1
        out += part
    return re.compile(f"{out}(?:/.*)?\\Z", re.DOTALL)


def _class(text: str, at: int) -> tuple[str, int]:
    """Return a class of characters as a regular expression, and where it ends."""
    end = re.compile(r"\[\^?(?:\\.|[^\]\\])+\]", re.DOTALL).match(text, at)
    if end is None:
        raise ValueError("a [ without its ], or with nothing in between")
    inside = end[0][1:-1]
    negated = "^" if inside.startswith("^") else ""
    members = re.findall(r"(\\.|[^\\])", inside[len(negated) :], re.DOTALL)
    out = "".join("-" if member == "-" else re.escape(member[-1]) for member in members)
    if members[0] == "-" or members[-1] == "-":
        raise ValueError(r"a - begins or ends the [ ]: write \-")
    return f"[{negated}{out}]", end.end()

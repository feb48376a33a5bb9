"""Tasks about one fact to be found in files.

Paper: none (own evaluation tasks).
"""

from __future__ import annotations

import re

from . import files as formats
from .draw import Draw
from .task import Scenario
from .words import TEXT_EXTENSIONS

FAMILY = "read"


def hits(files: dict[str, str], pattern: str) -> dict[str, int]:
    """How many lines of each file a case-insensitive pattern matches."""
    regex = re.compile(pattern, re.IGNORECASE)
    found = {p: sum(bool(regex.search(x)) for x in t.splitlines()) for p, t in files.items()}
    return {path: count for path, count in found.items() if count}


def _spoken(d: Draw, words: tuple[str, ...], name: str) -> str:
    return name if d.chance(0.6) else " ".join(words)


def _settings(d: Draw, files: dict[str, str]) -> tuple[str, tuple, str]:
    style, rows, lines = formats.settings(d)
    path = formats.settings_file(d, style)
    heading = f"# {d.words_line(2, 3)}\n" if style != "json" and d.chance(0.2) else ""
    files[path] = formats.settings_text(style, lines, heading)
    index = d.below(len(rows))
    return path, rows[index], lines[index]


def setting(d: Draw, files: dict[str, str]) -> Scenario:
    """The value of a setting in a named file; sometimes the file has another extension."""
    path, (words, name, value), line = _settings(d, files)
    formats.clutter(d, files)
    asked = path
    stem = path.rsplit(".", 1)[0]
    alone = not any(p != path and p.startswith(stem) for p in files)
    if alone and d.chance(0.06):
        asked = f"{stem}.{d.pick(TEXT_EXTENSIONS)}"
        if asked in files:
            asked = path
    slots = {"file": asked, "key": _spoken(d, words, name)}
    data = {"path": path, "asked": asked, "line": line.strip(), "key": slots["key"]}
    return Scenario(FAMILY, "setting", slots, files, value, data)


def setting_anywhere(d: Draw, files: dict[str, str]) -> Scenario:
    """The value of a setting in some file."""
    path, (words, name, value), line = _settings(d, files)
    formats.clutter(d, files, 4)
    pattern = ".".join(re.split(r"[^A-Za-z0-9]", name))
    key = _spoken(d, words, name)
    if re.fullmatch(r"[a-z]+([A-Z][a-z]*)+", name):
        key, pattern = name, name
    else:
        pattern = ".".join(re.split(r"[^A-Za-z0-9]", key))
    if hits(files, pattern) != {path: 1}:
        return _again(setting_anywhere, d, files)
    data = {"path": path, "line": line.strip(), "pattern": pattern, "key": key}
    return Scenario(FAMILY, "setting_anywhere", {"key": key}, files, value, data)


def _again(make, d: Draw, files: dict[str, str]) -> Scenario:
    files.clear()
    return make(d, files)


def section(d: Draw, files: dict[str, str]) -> Scenario:
    """A setting of one section; other sections have settings of the same name."""
    names = d.several(d.term, d.between(2, 4))
    keys = d.several(lambda: "_".join(d.key_words()[:2]), d.between(1, 3))
    yaml = d.chance(0.35)
    count = len(names) * len(keys)
    values = iter(d.several(d.value, count))
    blocks, rows = [], []
    for name in names:
        lines = [f"{name}:" if yaml else f"[{name}]"]
        for key in keys:
            value = next(values)
            line = f"  {key}: {value}" if yaml else f"{key} = {value}"
            lines.append(line)
            rows.append((name, key, value, line.strip()))
        blocks.append("\n".join(lines) + "\n")
    path = d.file(("yaml", "yml") if yaml else ("ini", "cfg", "conf", "toml"))
    files[path] = ("" if yaml else "\n").join(blocks)
    formats.clutter(d, files, 2)
    name, key, value, line = d.pick(rows)
    slots = {"file": path, "section": name, "key": key}
    return Scenario(FAMILY, "section", slots, files, value, {"path": path, "line": line})


def cell(d: Draw, files: dict[str, str]) -> Scenario:
    """One cell of a table by row name and column name."""
    separator = d.pick(",,,,;")
    header, body = formats.table(d, d.between(1, 2), d.between(1, 2), d.between(3, 8))
    path = d.file(("csv", "csv", "csv", "txt", "dat"))
    files[path] = formats.table_text(header, body, separator)
    formats.clutter(d, files, 2)
    row = d.pick(body)
    column = d.between(1, len(header) - 1)
    slots = {"file": path, "row": row[0], "column": header[column], "first": header[0]}
    line = separator.join(row)
    data = {
        "path": path,
        "line": line,
        "header": header,
        "cells": row,
        "index": column,
        "separator": separator,
    }
    return Scenario(FAMILY, "cell", slots, files, row[column], data)


_FACTS_TRAIN = (
    "The {attribute} of {subject} is {value}.",
    "The {attribute} for {subject} is {value}.",
    "For {subject}, the {attribute} is {value}.",
    "Note: the {attribute} of {subject} is now {value}.",
    "{subject} has the {attribute} {value}.",
    "{subject} got the {attribute} {value}.",
    "Please note that {subject} has {value} as {attribute}.",
    "Since monday {value} is the {attribute} of {subject}.",
    "We gave {subject} the {attribute} {value}.",
)
_FACTS_EVAL = (
    "Remember that the {attribute} of {subject} is {value}.",
    "As of today the {attribute} for {subject} is {value}.",
    "{subject} was given the {attribute} {value}.",
)


def fact_sentence(d: Draw, attribute: str, subject: str, value: str) -> str:
    """A sentence that states the fact."""
    form = d.pick(_FACTS_EVAL if d.evaluation else _FACTS_TRAIN)
    text = form.format(attribute=attribute, subject=subject, value=value)
    return text[0].upper() + text[1:]


def subject(d: Draw) -> str:
    """A person or a thing with an attribute."""
    roll = d.rng.random()
    if roll < 0.4:
        return d.person()
    if roll < 0.55:
        return d.full_name()
    return f"the {d.word('adjective')} {d.word('noun')}"


def _facts(d: Draw, files: dict[str, str], folders: float) -> tuple[str, str, str, str, str]:
    count = d.between(1, 4)
    subjects = d.several(lambda: subject(d), count)
    attributes = [x.replace("/", " ") for x in d.distinct("attribute", min(count, 4))]
    values = d.several(lambda: d.number() if d.chance(0.5) else d.code(), count)
    lines = [
        fact_sentence(d, a, s, v) for s, a, v in zip(subjects, attributes, values, strict=True)
    ]
    index = d.below(count)
    line = lines[index]
    everything = d.shuffled(lines + [d.sentence() for _ in range(d.below(4))])
    path = d.file(TEXT_EXTENSIONS, folders)
    files[path] = "\n".join(everything) + "\n"
    return path, attributes[index], subjects[index], values[index], line


def fact(d: Draw, files: dict[str, str]) -> Scenario:
    """A fact stated in a sentence of a named file."""
    path, attribute, who, value, line = _facts(d, files, 0.1)
    formats.clutter(d, files, 2)
    slots = {"file": path, "attribute": attribute, "subject": who}
    return Scenario(FAMILY, "fact", slots, files, value, {"path": path, "line": line})


def fact_anywhere(d: Draw, files: dict[str, str]) -> Scenario:
    """A fact stated in a sentence of some file."""
    path, attribute, who, value, line = _facts(d, files, 0.2)
    formats.clutter(d, files, 4, 0.2)
    bare = who.removeprefix("the ")
    if hits(files, bare) != {path: 1}:
        return _again(fact_anywhere, d, files)
    slots = {"attribute": attribute, "subject": who}
    data = {"path": path, "line": line, "pattern": bare}
    return Scenario(FAMILY, "fact_anywhere", slots, files, value, data)


def log_value(d: Draw, files: dict[str, str]) -> Scenario:
    """The value that a service logged."""
    entries = formats.log_lines(d, d.between(3, 7))
    path = d.file(("log", "log", "txt", "out"))
    files[path] = formats.log_text(entries)
    formats.clutter(d, files, 2)
    entry = d.pick(entries)
    slots = {"file": path, "service": entry["service"], "field": entry["field"]}
    data = {"path": path, "line": formats.log_text([entry]).strip()}
    return Scenario(FAMILY, "log_value", slots, files, entry["value"], data)


def topic(d: Draw, files: dict[str, str]) -> Scenario:
    """What the only line of the file about a topic says, the file being known by topic."""
    topics = d.several(d.term, d.between(2, 5))
    shape = d.pick(("{}.txt", "{}_notes.txt", "notes_{}.md", "{}.md", "about-{}.txt", "{}.log"))
    key = d.pick(("code", "number", "price", "date", "result", "total", "status", "id"))
    if not d.evaluation and d.chance(0.5):
        key = d.word("key")
    values = d.several(d.value, len(topics))
    for name, value in zip(topics, values, strict=True):
        files[shape.format(name)] = f"{key}: {value}\n"
    d.used.update(files)
    if d.chance(0.5):
        formats.clutter(d, files, 2, 0.0)
    index = d.below(len(topics))
    path = shape.format(topics[index])
    clash = [p for p in files if topics[index] in p and p != path]
    if clash:
        return _again(topic, d, files)
    slots = {"topic": topics[index], "key": key}
    data = {"path": path, "line": f"{key}: {values[index]}"}
    return Scenario(FAMILY, "topic", slots, files, values[index], data)


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


def nth_line(d: Draw, files: dict[str, str]) -> Scenario:
    """A line of a file by its position."""
    lines = d.several(lambda: d.words_line(1, 4) if d.chance(0.6) else d.value(), d.between(3, 9))
    path = d.file(TEXT_EXTENSIONS)
    files[path] = "\n".join(lines) + "\n"
    formats.clutter(d, files, 2)
    roll = d.rng.random()
    if roll < 0.3:
        kind, index = "last_line", len(lines) - 1
    elif roll < 0.5:
        kind, index = "first_line", 0
    else:
        kind, index = "nth_line", d.between(0, min(len(lines), 7) - 1)
    spoken = _ORDINALS[index] if index < 7 and kind == "nth_line" else ""
    slots = {"file": path, "nth": spoken, "n": str(index + 1)}
    data = {"path": path, "n": index + 1}
    return Scenario(FAMILY, kind, slots, files, lines[index], data)


def which_file(d: Draw, files: dict[str, str]) -> Scenario:
    """The only file that holds a word or code."""
    needle = d.pick((d.code, d.pseudo, d.number, d.full_name))()
    count = d.between(2, 5)
    for _ in range(count):
        files[d.file(TEXT_EXTENSIONS)] = formats.prose(d, 1, 3)
    path = d.pick([p for p in files if p.rsplit(".", 1)[-1] in TEXT_EXTENSIONS])
    lines = files[path].splitlines()
    form = d.pick(("Remember {}.", "{}", "see {} for more", "The label says {}."))
    lines.insert(d.below(len(lines) + 1), form.format(needle))
    files[path] = "\n".join(lines) + "\n"
    if hits(files, re.escape(needle)) != {path: 1}:
        return _again(which_file, d, files)
    slots = {"needle": needle}
    return Scenario(FAMILY, "which_file", slots, files, path, {"path": path, "needle": needle})


_NOTES_TRAIN = (
    "The {n} is {v}.",
    "{n}: {v}",
    "our {n} is {v}",
    "Remember the {n} {v}.",
    "{v} is the {n}.",
    "I wrote down the {n} {v}.",
    "They changed the {n} to {v}.",
)


def note(d: Draw, files: dict[str, str]) -> Scenario:
    """A code, number or word that one sentence states, without saying whose."""
    count = d.between(1, 2)
    names = [x.replace("/", " ") for x in d.distinct("attribute", count)]
    values = d.several(lambda: d.number() if d.chance(0.5) else d.value(), count)
    forms = (
        ("We agreed on the {n} {v}.", "{v} is our {n}.", "By the way, the {n} is {v}.")
        if d.evaluation
        else _NOTES_TRAIN
    )
    form = d.pick(forms)
    lines = [form.format(n=n, v=v) for n, v in zip(names, values, strict=True)]
    path = d.file(TEXT_EXTENSIONS, 0.2)
    everything = d.shuffled(lines + [d.sentence() for _ in range(d.below(4))])
    files[path] = "\n".join(everything) + "\n"
    formats.clutter(d, files, 3, 0.2)
    pattern = names[0].replace(" ", ".")
    data = {"path": path, "line": lines[0], "pattern": pattern, "key": names[0]}
    if d.chance(0.5):
        slots = {"file": path, "name": names[0]}
        return Scenario(FAMILY, "note", slots, files, values[0], data)
    if hits(files, pattern) != {path: 1}:
        return _again(note, d, files)
    return Scenario(FAMILY, "note_anywhere", {"name": names[0]}, files, values[0], data)


def show(d: Draw, files: dict[str, str]) -> Scenario:
    """All of a short file."""
    path = d.file(TEXT_EXTENSIONS, 0.08)
    make = d.pick((d.sentence, lambda: d.words_line(1, 4), d.value, d.full_name))
    text = "\n".join(d.several(make, d.between(1, 4)))
    files[path] = text + "\n"
    formats.clutter(d, files, 2)
    return Scenario(FAMILY, "show", {"file": path}, files, text, {"path": path})


BUILDERS = {
    "setting": (setting, 3.0),
    "setting_anywhere": (setting_anywhere, 2.0),
    "section": (section, 1.2),
    "cell": (cell, 1.5),
    "fact": (fact, 1.5),
    "fact_anywhere": (fact_anywhere, 1.5),
    "log_value": (log_value, 1.0),
    "topic": (topic, 1.0),
    "line": (nth_line, 1.5),
    "which_file": (which_file, 1.0),
    "note": (note, 1.6),
    "show": (show, 1.0),
}

"""Tasks to be answered from the message alone, without a tool.

Paper: none (own evaluation tasks).
"""

from __future__ import annotations

from . import files as formats
from .draw import Draw
from .read import subject
from .task import Scenario

FAMILY = "direct"
POSITIONS = ("first", "second", "third", "fourth", "fifth", "last")


def _listed(d: Draw, items: list[str]) -> str:
    roll = d.rng.random()
    if roll < 0.6:
        return ", ".join(items)
    if roll < 0.8:
        return ", ".join(items[:-1]) + " and " + items[-1]
    return " ".join(items) if roll < 0.9 else "; ".join(items)


def _phrase(d: Draw) -> str:
    roll = d.rng.random()
    if roll < 0.5:
        return d.words_line(1, 4)
    if roll < 0.7:
        return d.sentence().rstrip(".")
    return d.value() if roll < 0.85 else d.full_name()


def repeat(d: Draw, files: dict[str, str]) -> Scenario:
    """A given phrase to be repeated."""
    phrase = _phrase(d)
    return Scenario(FAMILY, "repeat", {"phrase": phrase}, files, phrase)


def _items(d: Draw, low: int = 3, high: int = 7) -> list[str]:
    pool = d.pick(("thing", "color", "city", "person", "noun", "pseudo", "number"))
    count = d.between(low, high)
    if pool == "pseudo":
        return d.several(d.pseudo, count)
    if pool == "number":
        return d.several(lambda: d.number(10, 9999), count)
    items = d.distinct(pool, count)
    return [x.capitalize() for x in items] if pool in ("city", "person") else items


def pick(d: Draw, files: dict[str, str]) -> Scenario:
    """The item of a list at a position."""
    items = _items(d)
    position = d.pick((*POSITIONS[: min(len(items), 5)], "last"))
    index = -1 if position == "last" else POSITIONS.index(position)
    slots = {"items": _listed(d, items), "nth": position}
    return Scenario(FAMILY, "pick", slots, files, items[index], {"items": items})


def member(d: Draw, files: dict[str, str]) -> Scenario:
    """Whether a word is in a list."""
    items = _items(d)
    there = d.chance(0.5)
    if there:
        word = d.pick(items)
    else:
        word = items.pop(d.below(len(items)))
    slots = {"items": _listed(d, items), "word": word}
    return Scenario(FAMILY, "member", slots, files, "yes" if there else "no", {"items": items})


_STATEMENTS_EVAL = ("{s} received the {a} {v}.", "The {a} belonging to {s} is {v}.")
_STATEMENTS_TRAIN = (
    "The {a} of {s} is {v}.",
    "{s} has the {a} {v}.",
    "The {a} for {s} is {v}.",
    "{s} got the {a} {v}.",
    "{s} uses {v} as {a}.",
    "{v} is the {a} of {s}.",
    "The {a} {v} goes to {s}.",
    "We gave {s} the {a} {v}.",
    "The {a} that {s} has is {v}.",
)


def statement(d: Draw, files: dict[str, str]) -> Scenario:
    """A fact stated in the message among others."""
    count = d.between(1, 4)
    subjects = d.several(lambda: subject(d), count)
    attribute = d.word("attribute").replace("/", " ")
    values = d.several(lambda: d.number() if d.chance(0.5) else d.value(), count)
    form = d.pick(_STATEMENTS_EVAL if d.evaluation else _STATEMENTS_TRAIN)
    said = [form.format(s=s, a=attribute, v=v) for s, v in zip(subjects, values, strict=True)]
    text = " ".join(x[0].upper() + x[1:] for x in said)
    index = d.below(count)
    slots = {"statement": text, "attribute": attribute, "subject": subjects[index]}
    data = {"sentence": said[index]}
    return Scenario(FAMILY, "statement", slots, files, values[index], data)


_PROPERTIES_TRAIN = "red green blue heavy light cold warm broken new old wet dry soft hard".split()
_PROPERTIES_EVAL = "striped golden fragile hollow shiny painted".split()


def which(d: Draw, files: dict[str, str]) -> Scenario:
    """Which of some things has a stated property."""
    count = d.between(2, 5)
    pool = d.pick(("thing", "noun"))
    things = d.distinct(pool, count)
    if d.evaluation:
        properties = d.some(_PROPERTIES_EVAL, count)
    elif d.chance(0.3):
        properties = d.some(_PROPERTIES_TRAIN, count)
    else:
        properties = d.distinct("adjective", count)
    roll = d.rng.random()
    if roll < 0.5:
        said = ", ".join(f"the {t} is {p}" for t, p in zip(things, properties, strict=True))
    else:
        said = ". ".join(f"The {t} is {p}" for t, p in zip(things, properties, strict=True))
    index = d.below(count)
    slots = {"statement": said[0].upper() + said[1:] + ".", "property": properties[index]}
    data = {"sentence": f"the {things[index]} is {properties[index]}"}
    return Scenario(FAMILY, "which", slots, files, things[index], data)


def greeting(d: Draw, files: dict[str, str]) -> Scenario:
    """A greeting that names its writer, who wants to be greeted back by name."""
    name = d.person()
    return Scenario(FAMILY, "greeting", {"person": name}, files, name)


def _with_files(make):
    def build(d: Draw, files: dict[str, str]) -> Scenario:
        formats.clutter(d, files, 1)
        return make(d, files)

    return build


BUILDERS = {
    "repeat": (_with_files(repeat), 1.2),
    "pick": (_with_files(pick), 1.8),
    "member": (_with_files(member), 1.2),
    "statement": (_with_files(statement), 1.5),
    "which": (_with_files(which), 1.2),
    "greeting": (_with_files(greeting), 0.6),
}

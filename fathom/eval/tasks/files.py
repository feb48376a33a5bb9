"""Small files in the formats that tasks are about: settings, sections, tables, logs, prose.

Paper: none (data of the task generator).
"""

from __future__ import annotations

from .draw import Draw
from .words import CODE_EXTENSIONS, CONFIG_EXTENSIONS, TEXT_EXTENSIONS

ANY_EXTENSION = TEXT_EXTENSIONS + CONFIG_EXTENSIONS + CODE_EXTENSIONS
SETTING_STYLES = ("equals", "tight", "colon", "json", "bullet", "yaml", "export")


def style_name(d: Draw, words: tuple[str, ...], style: str) -> str:
    """A setting's name as the format writes it."""
    if style in ("tight", "export"):
        roll = d.rng.random()
        joined = "_".join(words)
        return joined.upper() if roll < 0.6 else joined if roll < 0.9 else ".".join(words)
    if style == "json" and d.chance(0.4):
        return words[0] + "".join(w.capitalize() for w in words[1:])
    if style == "bullet":
        return " ".join(words)
    if style == "yaml" and d.chance(0.3):
        return "-".join(words)
    return ("-" if d.chance(0.15) else "_").join(words)


def setting_line(style: str, name: str, value: str) -> str:
    """One line of a settings file, without commas."""
    if style == "equals":
        return f"{name} = {value}"
    if style == "tight":
        return f"{name}={value}"
    if style == "export":
        return f"export {name}={value}"
    if style == "bullet":
        return f"- {name}: {value}"
    if style == "json":
        return f'  "{name}": {value if plain_number(value) else chr(34) + value + chr(34)}'
    return f"{name}: {value}"


def plain_number(value: str) -> bool:
    """Whether JSON may hold this value without quotes."""
    return value.isdigit() and (value == "0" or value[0] != "0")


def settings_text(style: str, lines: list[str], heading: str = "") -> str:
    """The file of these setting lines."""
    if style == "json":
        return "{\n" + ",\n".join(lines) + "\n}\n"
    return heading + "\n".join(lines) + "\n"


def settings(d: Draw, low: int = 3, high: int = 8) -> tuple[str, list[tuple], list[str]]:
    """A settings file: its style, (words, name, value) of each setting, its lines."""
    style = d.pick(SETTING_STYLES)
    count = d.between(low, high)
    keys = d.several(d.key_words, count)
    values = d.several(d.value, count)
    rows, lines, seen = [], [], set()
    for words, value in zip(keys, values, strict=True):
        name = style_name(d, words, style)
        flat = "".join(words)
        if any(flat in other or other in flat for other in seen):
            continue
        seen.add(flat)
        rows.append((words, name, value))
        lines.append(setting_line(style, name, value))
    return style, rows, lines


def settings_file(d: Draw, style: str) -> str:
    """A file name that suits the style."""
    by_style = {
        "json": ("json",),
        "yaml": ("yaml", "yml"),
        "tight": ("env", "properties", "conf", "cfg"),
        "equals": ("ini", "cfg", "conf", "toml", "txt"),
        "bullet": ("md", "txt"),
        "export": ("sh", "env"),
        "colon": ("txt", "conf", "cfg", "info", "dat"),
    }
    return d.file(by_style[style])


def prose(d: Draw, low: int = 2, high: int = 5) -> str:
    """A file of plain sentences."""
    return "".join(f"{d.sentence()}\n" for _ in range(d.between(low, high)))


def distractor(d: Draw) -> str:
    """A short file about something else."""
    roll = d.rng.random()
    if roll < 0.4:
        return prose(d, 1, 4)
    if roll < 0.7:
        style, _, lines = settings(d, 2, 4)
        return settings_text(style, lines)
    return "".join(f"{d.words_line(1, 4)}\n" for _ in range(d.between(1, 5)))


def clutter(d: Draw, files: dict[str, str], most: int = 3, folders: float = 0.1) -> None:
    """Add up to `most` other files."""
    for _ in range(d.below(most + 1)):
        files[d.file(ANY_EXTENSION, folders)] = distractor(d)


def table(
    d: Draw, numbers: int, texts: int, rows: int, separator: str = ","
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: first an unique name, then the columns in random order."""
    columns = d.distinct("text_column", 1 + texts)
    number_names = d.distinct("number_column", numbers)
    first_pool = d.pick(("person", "city", "thing", "noun", "pseudo"))
    if first_pool == "pseudo":
        names = d.several(d.pseudo, rows)
    else:
        names = d.distinct(first_pool, rows)
    kinds = [("t", name) for name in columns[1:]] + [("n", name) for name in number_names]
    kinds = d.shuffled(kinds)
    top = d.pick((20, 100, 100, 1000, 9999))
    text_values = {}
    for _, name in [k for k in kinds if k[0] == "t"]:
        pool = d.pick(("color", "city", "noun", "adjective"))
        text_values[name] = d.distinct(pool, d.between(2, 4))
    body = []
    for row_name in names:
        cells = [row_name]
        for kind, name in kinds:
            cells.append(d.pick(text_values[name]) if kind == "t" else str(d.between(1, top)))
        body.append(cells)
    return [columns[0]] + [name for _, name in kinds], body


def table_text(header: list[str], body: list[list[str]], separator: str) -> str:
    """The table as a text file with a header line."""
    return "".join(f"{separator.join(row)}\n" for row in [header, *body])


def log_lines(d: Draw, count: int) -> list[dict[str, str]]:
    """Log entries: time, level, service, event and a value; services differ."""
    services = d.several(d.term, count)
    values = d.several(lambda: d.number() if d.chance(0.5) else d.code(), count)
    day = d._own(d.day)
    start = d.between(0, 600)
    fields = ("id", "code", "request", "session", "job", "pid", "ticket")
    if not d.evaluation and d.chance(0.5):
        fields = d.several(lambda: d.word("key"), 4)
    entries = []
    for service, value in zip(services, values, strict=True):
        start += d.between(1, 40)
        entries.append(
            {
                "time": f"{day} {start // 60:02d}:{start % 60:02d}",
                "level": d.pick(("INFO", "WARN", "ERROR", "DEBUG", "INFO")),
                "service": service,
                "field": d.pick(fields),
                "event": d.pick(("started", "stopped", "ready", "failed", "retry", "timeout")),
                "value": value,
            }
        )
    return entries


def log_text(entries: list[dict[str, str]]) -> str:
    """The log file."""
    return "".join(
        f"{e['time']} {e['level']} {e['service']}: {e['event']} {e['field']}={e['value']}\n"
        for e in entries
    )

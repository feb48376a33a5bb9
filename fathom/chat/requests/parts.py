"""Content that comes as text or as a list of parts.

Every part becomes text here: what this model cannot see is named in its place, as the hosted API
does, and a warning says so.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

from fathom.chat.requests.fields import Fields
from fathom.chat.requests.history import BLANK

_TEXTS = ("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
_NAMES = {
    "image_url": "Image",
    "image": "Image",
    "input_image": "Image",
    "input_audio": "Audio",
    "file": "File",
    "input_file": "File",
    "document": "Document",
}


def read_content(fields: Fields, name: str, warnings: list[str]) -> str | None:
    """Return the text of a content field, None if it is missing or null."""
    value = fields.take(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.fail(name, "must be text or a list of parts")
    return BLANK.join(read_part(part, warnings) for part in fields.objects(name))


def read_part(part: Fields, warnings: list[str]) -> str:
    """Return the text of one part. Raises RequestError for a part that is neither."""
    kind = part.required_text("type")
    if kind in _TEXTS:
        return part.required_text("refusal" if kind == "refusal" else "text")
    if kind not in _NAMES:
        part.fail("type", f"unknown part {kind!r}: use text")
    warnings.append(f"{part.path('type')}: a part of type {kind!r} was replaced by its name")
    return f"[Unsupported {_NAMES[kind]}]"

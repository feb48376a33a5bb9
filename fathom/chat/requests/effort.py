"""Every spelling of how hard to think, mapped to the mode of the prompt.

Paper: §5.1.1 (reasoning efforts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fathom.chat.messages import as_mapping
from fathom.chat.requests.fields import Fields
from fathom.errors import RequestError

# The April model knows two thinking modes, so what lies between them maps differently there.
_MODES: dict[str, dict[str, str]] = {
    "0424": {
        "none": "off",
        "minimal": "high",
        "low": "high",
        "medium": "high",
        "high": "high",
        "xhigh": "max",
        "ultra": "max",
        "max": "max",
    },
    "0731": {
        "none": "off",
        "minimal": "low",
        "low": "low",
        "medium": "high",
        "high": "high",
        "xhigh": "high",
        "ultra": "max",
        "max": "max",
    },
}
_SWITCHES = ("enabled", "disabled", "adaptive")


def resolve_effort(effort: str, revision: str = "0731", param: str = "reasoning_effort") -> str:
    """Return the prompt's mode ("off", "low", "high" or "max") for an effort by any of its names.

    Raises RequestError, with `param`, for an unknown name.
    """
    modes = _MODES.get(revision, _MODES["0731"])
    if effort not in modes:
        raise RequestError(f"unknown effort {effort!r}: use one of {', '.join(modes)}", param)
    return modes[effort]


def read_thinking(
    switch: str | None, effort: str | None, param: str, revision: str, default: str
) -> str:
    """Return the prompt's mode from the switch (enabled, disabled, adaptive) and the effort.

    A switch beats an effort: "disabled" turns thinking off whatever the effort, and "enabled" makes
    an effort of "none" the default one.
    """
    mode = resolve_effort(effort, revision, param) if effort is not None else None
    if switch == "disabled":
        return "off"
    fallback = resolve_effort(default, revision, param)
    if switch in ("enabled", "adaptive"):
        if mode in (None, "off"):
            return fallback if fallback != "off" else resolve_effort("high", revision)
        return mode
    return fallback if mode is None else mode


def read_switch(fields: Fields) -> str | None:
    """Return the type of the field `thinking`, None without one.

    True and false count as enabled and disabled.
    """
    value = fields.take("thinking")
    if value is None:
        return None
    if isinstance(value, bool):
        return "enabled" if value else "disabled"
    kind = (as_mapping(value) or {}).get("type")
    if kind not in _SWITCHES:
        raise RequestError(
            f"must be an object whose type is one of {', '.join(_SWITCHES)}: got {value!r}",
            fields.path("thinking.type"),
        )
    return kind


def read_template_arguments(arguments: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return switch and effort from the template arguments that vLLM and SGLang take."""
    for name in ("thinking", "enable_thinking"):
        if isinstance(arguments.get(name), bool):
            switch = "enabled" if arguments[name] else "disabled"
            break
    else:
        switch = None
    effort = arguments.get("reasoning_effort")
    return switch, effort if isinstance(effort, str) else None

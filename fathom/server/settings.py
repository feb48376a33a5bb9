"""How a server is set up: addresses, keys and the bounds that protect it.

Paper: §5.3.1 (context of 384K tokens for Think Max).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from fathom.errors import ServerError

VERSION = version("fathom")
MAX_THINKING_FLOOR = 393_216  # tokens of context that Think Max asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client, and all together, may ask of the server. Times are in seconds."""

    request_bytes: int = 8 << 20  # a prompt of a million tokens has 4 to 7 MB
    json_parts: int = 400_000  # strings, lists and objects of one body
    json_values: int = 1_200_000  # and all its values: a prompt of a million token ids
    messages: int = 10_000
    tools: int = 1_024
    schema_bytes: int = 256 << 10  # of one schema that replies are held to
    schema_depth: int = 64
    schema_levels: int = 8_192  # depth times references: how deep following them could lead
    pattern_size: int = 100_000  # characters of a pattern with its repetitions written out
    json_depth: int = 128
    prompt_tokens: int | None = None  # None: what the model's context holds
    max_tokens: int = 393_216
    choices: int = 16
    stop_strings: int = 16
    stop_length: int = 256
    connections: int = 512
    running: int = 64  # completions at the same time
    waiting: int = 256  # completions that wait for one of those to end
    header_bytes: int = 64 << 10  # of one request: its head, and all that frames its body
    header_seconds: float = 15.0
    body_seconds: float = 60.0
    write_bytes: int = 16 << 10  # that a slow reader takes in that time at least
    write_seconds: float = 60.0  # how long a client may leave its answer unread
    idle_seconds: float = 75.0  # between two requests of one connection
    keep_alive_seconds: float = 10.0  # between two signs of life in a silent stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a server is told at its start.

    stream_arguments: pass on a call's arguments while they are written; otherwise a call reaches
    the client only when it is complete. repaired_calls: deliver calls that the parser had to
    rebuild by guesswork. require_reasoning: refuse assistant turns with calls whose reasoning is
    missing, where the server cannot restore it. origins: web pages of other origins that may call.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # repr ends up in logs
    revision: str = "0424"
    stream_arguments: bool = False
    repaired_calls: bool = False
    require_reasoning: bool = False
    origins: tuple[str, ...] = ()
    log_level: Literal["error", "warning", "info"] = "warning"
    stored_turns: int = 1_000
    stored_bytes: int = 64 << 20
    limits: Limits = Limits()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_settings(settings: Settings) -> None:
    """Raises ServerError for settings that nobody should run."""
    if not settings.api_keys and not is_loopback(settings.host):
        raise ServerError(
            f"host {settings.host} can be reached from other machines, and there is no API key: "
            "set --api-key (or FATHOM_API_KEY), or listen on 127.0.0.1"
        )
    for key in settings.api_keys:
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise ServerError("an API key must be at least 8 printable ASCII characters, no blanks")

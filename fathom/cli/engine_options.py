"""What commands can tell the engine of a model that runs in this process.

Paper: none (command line).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.errors import ConfigError, SandboxError

if TYPE_CHECKING:
    from fathom.engine.options import EngineConfig

Device = Annotated[
    str | None, typer.Option(help="Where the model runs, cpu or cuda (default: cpu).")
]
DiskCache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep what prompts were computed to in this folder, so that they cost nothing again "
        "after a restart. It holds conversations in coded form.",
    ),
]
DiskCacheSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What --disk-cache may take (default: 16GiB)."),
]
HostCacheSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Main memory for what the device has no room for (default: 1GiB)."
    ),
]
CacheTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens whose entries fit beside the model, of all completions together (default: "
        "one context and some, or what a quarter of the free memory holds).",
    ),
]
CheckpointSpacing = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens between saved states of long prompts, a multiple of 256; 0 for none but at "
        "ends (default: 4096).",
    ),
]
TokenLog = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write every token to a log in this folder before it is sent: who asks the same again "
        "after a crash gets the same answer, from where it was. It holds prompts.",
    ),
]
Drafts = Annotated[
    int | None,
    typer.Option(
        min=0, max=7, help="Tokens that the MTP block guesses a step, while that pays (default: 0)."
    ),
]
IndexKeys = Annotated[
    str | None, typer.Option(metavar="fp4|fp8", help="Format of indexer keys (default: fp4).")
]
BatchInvariant = Annotated[
    bool | None,
    typer.Option(
        help="Let answers have the same bits whatever runs beside them (default); without, a GPU "
        "reads prompts faster. A CPU has no other way."
    ),
]
MaxSequences = Annotated[
    int | None, typer.Option(min=1, help="Completions computed together (default: 16).")
]


def engine_config(options: dict[str, Any]) -> EngineConfig | None:
    """The configuration by the options that were given, by their names; None when none was.

    Raises ConfigError for values that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return None
    if "disk_cache_size" in given and "disk_cache" not in given:
        raise ConfigError("--disk-cache-size is of no use without --disk-cache")
    from fathom.engine.options import EngineConfig

    names = {
        "disk_cache": "disk",
        "token_log": "wal",
        "index_keys": "indexer",
        **{name: name for name in ("cache_tokens", "checkpoint_spacing", "drafts")},
        **{name: name for name in ("batch_invariant", "max_sequences")},
    }
    values: dict[str, Any] = {names[name]: given[name] for name in given if name in names}
    if (text := given.get("disk_cache_size")) is not None:
        values["disk_bytes"] = _size(text, "--disk-cache-size")
    if (text := given.get("host_cache_size")) is not None:
        size, there_is = _size(text, "--host-cache-size"), _main_memory()
        if size > there_is:
            raise ConfigError(
                f"--host-cache-size is {text!r}: this machine has {there_is / 2**30:.1f} GiB of "
                "main memory"
            )
        half = size // 2  # entries, and states
        values |= {"host_bytes": half, "checkpoint_bytes": half}
    return EngineConfig(**values)


def _main_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(text: str, option: str) -> int:
    from fathom.sandbox.types import parse_size

    try:
        return 0 if text.strip() == "0" else parse_size(text, option)
    except SandboxError as error:
        raise ConfigError(str(error)) from None

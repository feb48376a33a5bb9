"""The one interface between the server and whatever generates tokens.

The server renders prompts, parses completions and speaks the APIs; an engine turns token ids into
token ids. There are three engines: the model in this process (`fathom.engine.backend`), a scripted
one for tests and measurements (`fathom.server.scripted`), and any server of plain completions
behind a URL (`fathom.server.gateway`).

Paper: none (inference interface).
"""

from __future__ import annotations

from fathom.chat.generation import (
    Backend,
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    Shaping,
    TokenMask,
    TokenOutput,
)

__all__ = [
    "Backend",
    "BackendInfo",
    "GenerationEnd",
    "GenerationRequest",
    "Output",
    "Prefilled",
    "Shaping",
    "TokenMask",
    "TokenOutput",
]

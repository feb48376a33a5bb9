"""What the agent needs of a model: anything that can write the next assistant message.

The agent knows only this protocol. A model behind a URL (`http_model.py`) and a model in the same
process, which implements it elsewhere, are equal to it, and neither drags in the other's libraries.

Paper: none (client side of a serving interface).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fathom.chat.reply import OnPiece, Reply, Sampling

API_KEY_VARIABLE = "FATHOM_API_KEY"


class Model(Protocol):
    """Anything that can write the next assistant message of a conversation.

    `messages` and `tools` are plain dictionaries in the OpenAI chat shape; an assistant message
    carries its reasoning as `reasoning_content`.
    """

    @property
    def name(self) -> str:
        """What to call the model in reports."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and reply may have together; None when that is unknown."""
        ...

    def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
    ) -> int | None:
        """The exact length of the prompt, or None when only a server could tell."""
        ...

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
        max_tokens: int | None = None,
        sampling: Sampling = ...,
        on_piece: OnPiece | None = None,
    ) -> Reply:
        """Write the next message and hand its parts to `on_piece` as they appear.

        `on_piece` may be called from another thread while this call is awaited. Raises FathomError
        when no reply can be had; whatever the model writes is a reply.
        """
        ...


def api_key_from_environment() -> str | None:
    """The key in FATHOM_API_KEY, or None. No other variable is read.

    Keys of other programs are left alone: a key must not travel to a URL it was not meant for.
    """
    return os.environ.get(API_KEY_VARIABLE) or None

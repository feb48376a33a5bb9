"""Making a model call without masks: let it finish its thought, then write the opening for it.

Paper: §5.1.1 (reasoning comes before calls).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fathom.chat.protocol import DSML, THINK_END
from fathom.chat.tokenizer import Tokenizer
from fathom.server.backend import (
    Backend,
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)

_OPENING = f"\n\n<{DSML}tool_calls>\n"


class ForcedBackend:
    """Generates in two parts: the thought of the model's own, and calls behind a given opening.

    The second prompt extends the first one by what was said, so an engine with a prefix cache
    computes nothing twice.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def info(self) -> BackendInfo:
        """As of the backend behind it."""
        return self._backend.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """As of the backend behind it."""
        return self._backend.tokenizer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """The thought, its end, the opening, and what the model writes behind that."""
        thought = _Thought(self.tokenizer)
        async with aclosing(self._backend.generate(request)) as outputs:
            async for output in outputs:
                if isinstance(output, GenerationEnd):
                    if output.finish_reason == "length":
                        yield output
                        return
                    break  # it ended without ending its thought; the opening does that
                if isinstance(output, TokenOutput):
                    if thought.ends_with(output):
                        break
                yield output
        opening = self._outputs(f"{THINK_END}{_OPENING}")
        for output in opening:
            yield output
        said = [*thought.ids, *(o.token_id for o in opening if o.token_id is not None)]
        left = request.max_tokens - thought.count - len(opening)
        if left < 1:
            yield GenerationEnd(finish_reason="length")
            return
        rest = replace(
            request,
            prompt=[*request.prompt, *said],
            text=request.text + thought.text + THINK_END + _OPENING,
            max_tokens=left,
        )
        async with aclosing(self._backend.generate(rest)) as outputs:
            async for output in outputs:
                if isinstance(output, GenerationEnd):
                    # Its counts are those of the second part alone.
                    yield GenerationEnd(finish_reason=output.finish_reason)
                elif not isinstance(output, Prefilled):
                    yield output

    async def aclose(self) -> None:
        """The backend behind it is its owner's to close."""

    def _outputs(self, text: str) -> list[TokenOutput]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return [TokenOutput(token_id=None, text=text)]
        ids = tokenizer.encode(text, special=True)
        return [TokenOutput(token_id=i, text=tokenizer.decode([i])) for i in ids]


class _Thought:
    """What the model thought so far, up to the mark that ends it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.count = 0
        self._ends = frozenset[int]()
        if tokenizer is not None:
            self._ends = frozenset(tokenizer.token_id(n) for n in ("think_end", "dsml", "eos"))

    def ends_with(self, output: TokenOutput) -> bool:
        """Whether this token ends the thought; then it is not part of it."""
        token = output.token_id
        if token in self._ends or (token is None and THINK_END in output.text):
            return True
        self.count += 1
        self.text += output.text
        if token is not None:
            self.ids.append(token)
        return False

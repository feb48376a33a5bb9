"""Making a model call without masks: let it finish its thought, then write the opening for it.

The opening goes as far as what follows is settled: to the name of the tool if there is one choice.

Paper: §5.1.1 (reasoning comes before calls).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fathom.chat.protocol import DSML, THINK_END
from fathom.chat.requests import PromptRequest
from fathom.chat.stops import StopFinder
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

_BLOCK = f"{THINK_END}\n\n<{DSML}tool_calls>\n"


class ForcedBackend:
    """Generates in two parts: the thought of the model's own, and calls behind a given opening.

    The second prompt extends the first one by what was said, so an engine with a prefix cache
    computes nothing twice.
    """

    def __init__(self, backend: Backend, ask: PromptRequest) -> None:
        self._backend = backend
        self._thinks = ask.reasons  # else the prompt itself opens the block of calls
        names = ask.tool_choice.names
        invoke = f'<{DSML}invoke name="{names[0]}">\n' if len(names) == 1 else ""
        self._opening = (_BLOCK if self._thinks else "") + invoke

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
        if self._thinks:
            async with aclosing(self._backend.generate(request)) as outputs:
                async for output in outputs:
                    if isinstance(output, GenerationEnd):
                        if output.finish_reason == "length":
                            for held in thought.flush():
                                yield held
                            yield output
                            return
                        break  # it ended without ending its thought; the opening does that
                    if not isinstance(output, TokenOutput):
                        yield output
                        continue
                    for part in thought.take(output):
                        yield part
                    if thought.over:
                        break
            for held in thought.flush():
                yield held
        opening = self._outputs(self._opening)
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
            text=request.text + thought.text + self._opening,
            max_tokens=left,
        )
        async with aclosing(self._backend.generate(rest)) as outputs:
            async for output in outputs:
                if isinstance(output, GenerationEnd):
                    # Its counts are those of the second part alone.
                    yield GenerationEnd(finish_reason=output.finish_reason)
                elif not (self._thinks and isinstance(output, Prefilled)):
                    yield output

    async def aclose(self) -> None:
        """The backend behind it is its owner's to close."""

    def _outputs(self, text: str) -> list[TokenOutput]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return [TokenOutput(token_id=None, text=text)] if text else []
        ids = tokenizer.encode(text, special=True)
        return [TokenOutput(token_id=i, text=tokenizer.decode([i])) for i in ids]


class _Thought:
    """What the model thought so far, up to the mark that ends it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.count = 0
        self.over = False
        self._stops = StopFinder([THINK_END])  # the mark may come in pieces, and behind a word
        self._ends = frozenset[int]()
        if tokenizer is not None:
            self._ends = frozenset(tokenizer.token_id(n) for n in ("think_end", "dsml", "eos"))

    def take(self, output: TokenOutput) -> list[TokenOutput]:
        """Take more, and return what of it is thought; `over` when the mark came."""
        token = output.token_id
        if token in self._ends:
            self.over = True
            return []
        self.count += 1
        if token is not None:
            self.ids.append(token)
            self.text += output.text
            return [output]
        kept = self._stops.push(output.text)
        self.over = self._stops.found is not None
        return self._keep(kept)

    def flush(self) -> list[TokenOutput]:
        """The rest that began like the mark and was none."""
        return [] if self.over else self._keep(self._stops.flush())

    def _keep(self, text: str) -> list[TokenOutput]:
        self.text += text
        return [TokenOutput(token_id=None, text=text)] if text else []

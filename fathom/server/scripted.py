"""An engine without a model: what it says is a function of the prompt.

It stands behind the server in tests, measurements and recordings of client sessions, where the
answer must be known beforehand. Everything around it is real: tokens come from a real tokenizer
and go through the same parser, masks and renderers as a model's.

Paper: none (testing).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import anyio

from fathom.chat.protocol import EOS
from fathom.chat.tokenizer import Tokenizer
from fathom.errors import BackendError
from fathom.server.backend import (
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A scripted completion.

    text: what follows the prompt, spelled markup included; EOS is added unless `ends` is False.
    delay: seconds between tokens; first_delay: before the first one. fail_after: the number of
    tokens after which the engine breaks.
    """

    text: str
    ends: bool = True
    delay: float = 0.0
    first_delay: float = 0.0
    fail_after: int | None = None


Script = Callable[[str], "Reply | str"]


class ScriptedBackend:
    """Says what `script` makes of the prompt's text.

    `running` and `cancelled` count completions, for tests that ask whether work was freed. Where a
    mask forbids the next scripted token, the script is left, and what is said from there on leads
    to the end of what the mask demands.
    """

    def __init__(
        self,
        script: Script,
        tokenizer: Tokenizer,
        *,
        name: str = "scripted",
        context_tokens: int = 1 << 20,
        masks: bool = True,
    ) -> None:
        self._script = script
        self._tokenizer = tokenizer
        self._info = BackendInfo(
            name=name, context_tokens=context_tokens, masks=masks, shaping=False
        )
        # Off the script, these bring a call or a JSON value to its end.
        closing = [tokenizer.encode(text) for text in ('"', "}", "]", "</", "\n", "0", "a")]
        single = [ids[0] for ids in closing if len(ids) == 1]
        ends = (tokenizer.eos_id, tokenizer.token_id("dsml"))
        self._closing = {token: 0 for token in single} | {token: -1 << 60 for token in ends}
        self._seen: list[tuple[int, ...]] = []
        self.requests: list[GenerationRequest] = []
        self.running = 0
        self.cancelled = 0

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was given."""
        return self._tokenizer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """Say the scripted text token by token. Raises BackendError where the script says so."""
        self.requests.append(replace(request, mask=None))
        del self.requests[:-1000]
        self.running += 1
        finished = False
        try:
            async with aclosing(self._outputs(request)) as outputs:
                async for output in outputs:
                    finished = isinstance(output, GenerationEnd)
                    yield output
        except BackendError:
            finished = True
            raise
        finally:
            self.running -= 1
            self.cancelled += not finished

    async def aclose(self) -> None:
        """Nothing to release."""

    async def _outputs(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        made = self._script(request.text)
        reply = made if isinstance(made, Reply) else Reply(text=made)
        planned = self._tokenizer.encode(reply.text + (EOS if reply.ends else ""), special=True)
        eos, decoder = self._tokenizer.eos_id, self._tokenizer.incremental_decoder()
        cached = self._cached(request.prompt)
        if reply.first_delay:
            await anyio.sleep(reply.first_delay)
        yield Prefilled(prompt_tokens=len(request.prompt), cached_tokens=cached)
        count = 0
        while count < request.max_tokens:
            token = self._next(request, planned, count)
            if token is None:
                break
            if count == reply.fail_after:
                raise BackendError("the scripted engine was told to fail here")
            if reply.delay or count % 16 == 0:  # others must get their turn as well
                await anyio.sleep(reply.delay)
            count += 1
            is_end = token == eos or token in request.stop_token_ids
            text = decoder.flush() if is_end else decoder.push(token)
            top = tuple((token + at, -0.1 - at) for at in range(request.top_logprobs))
            yield TokenOutput(token_id=token, text=text, logprob=-0.1, top=top)
            if is_end:
                yield GenerationEnd(finish_reason="stop", completion_tokens=count)
                return
        yield GenerationEnd(finish_reason="length", completion_tokens=count)

    def _next(self, request: GenerationRequest, planned: list[int], at: int) -> int | None:
        token = planned[at] if at < len(planned) else None
        mask = request.mask
        if mask is None:
            return token
        bits = mask.allowed()
        if bits is not None and (token is None or not _is_set(bits, token)):
            token = self._way_out(bits)
            del planned[at:]
        if token is not None:
            mask.accept(token)
        return token

    def _way_out(self, bits: bytes) -> int | None:
        """Off the script: the token that ends something, of those allowed the least used."""
        allowed = [token for token in self._closing if _is_set(bits, token)]
        if not allowed:
            return _first_set(bits)
        token = min(allowed, key=lambda t: self._closing[t])
        self._closing[token] += 1
        return token

    def _cached(self, prompt: object) -> int:
        """How much of the prompt an earlier one began with."""
        ids = tuple(prompt)  # type: ignore[arg-type]
        longest = max((_common(seen, ids) for seen in self._seen), default=0)
        self._seen = [*self._seen[-7:], ids]
        return min(longest, len(ids) - 1)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The length of the common beginning, by halving: slices compare at the speed of C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_set(bits: bytes, token: int) -> bool:
    return token // 8 < len(bits) and bool(bits[token // 8] >> (token % 8) & 1)


def _first_set(bits: bytes) -> int | None:
    for at, byte in enumerate(bits):
        if byte:
            return 8 * at + (byte & -byte).bit_length() - 1
    return None

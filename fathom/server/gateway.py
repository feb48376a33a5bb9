"""The engine behind a URL: any server that offers plain completions, streamed.

With a tokenizer of its own the gateway sends token ids, so that text of users can never become a
special token, and asks for ids back, so that quoted markup stays text. Without one it sends text,
in which spelled special tokens of users are broken up first.

Paper: none (inference interface).
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, cast

import anyio
import httpx2

from fathom.chat.protocol import SPECIAL_TOKENS, UNUSED_TOKENS
from fathom.chat.segments import Segment
from fathom.chat.tokenizer import Tokenizer
from fathom.errors import BackendError, GenerationError
from fathom.server.backend import (
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)
from fathom.server.problems import Problem

_CONTEXT = 131_072  # where neither the upstream nor its user says
_LARGEST_LINE = 1 << 20
_TOKEN_NAME = re.compile(r"token_id:(\d+)")
# The first character of a special token: of each known one, and of any other in the usual form.
_SPELLED = re.compile(
    "|".join(
        f"{re.escape(token[0])}(?={re.escape(token[1:])})"
        for token in (*SPECIAL_TOKENS.values(), *UNUSED_TOKENS, "<\uff5c")
    )
)
_WAIT = re.compile(r"[\w,: +-]{1,40}", re.ASCII)  # seconds or a date
_FINISHES = {"stop": "stop", "length": "length", "eos": "stop", "stop_sequence": "stop",
             "tool_calls": "stop", "max_tokens": "length"}  # fmt: skip


class GatewayBackend:
    """Generates with `POST {url}/completions` of another server.

    timeout: seconds to connect, and of silence in a stream, before the upstream counts as lost.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        context_tokens: int = _CONTEXT,
        tokenizer: Tokenizer | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._url = completions_base(url)
        self._tokenizer = tokenizer
        self._info = BackendInfo(
            name=model,
            context_tokens=context_tokens,
            masks=False,
            logprobs=tokenizer is not None,
        )
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx2.Timeout(timeout, connect=min(timeout, 10.0))
        # Reading the certificates for each completion anew would cost it tens of milliseconds.
        self._tls = httpx2.create_ssl_context(trust_env=False)

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities: no masks, and log-probabilities only by token id."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that it was given."""
        return self._tokenizer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """Generate upstream; closing the generator closes the connection, which ends the work.

        Raises GenerationError for a prompt that the upstream refuses, Problem when it has too much
        to do, BackendError for the rest.
        """
        body = self._body(request)
        try:
            async with (
                httpx2.AsyncClient(
                    timeout=self._timeout, trust_env=False, verify=self._tls
                ) as client,
                client.stream(
                    "POST", f"{self._url}/completions", json=body, headers=self._headers
                ) as response,
            ):
                await _check(response)
                reader = _Reader(self._tokenizer, len(request.prompt))
                async for chunk in _events(response):
                    for output in reader.take(chunk):
                        yield output
                yield reader.end()
        except httpx2.HTTPError as error:
            raise BackendError(f"the upstream {self._url} failed: {_say(error)}") from error

    async def aclose(self) -> None:
        """Nothing to release: every completion has a connection of its own."""

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._info.name,
            "prompt": list(request.prompt) if self._tokenizer is not None else request.text,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "skip_special_tokens": False,
            **request.shaping.changes(),  # the names are those of the common servers
        }
        if self._tokenizer is not None:
            body["return_token_ids"] = True
        else:
            body["add_special_tokens"] = False  # the text begins with BOS already
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop_token_ids:
            body["stop_token_ids"] = list(request.stop_token_ids)
        if request.logprobs:
            body |= {"logprobs": request.top_logprobs, "return_tokens_as_token_ids": True}
        return body


async def discover(
    url: str, *, api_key: str | None = None, timeout: float = 10.0
) -> tuple[str, int | None]:
    """The upstream's first model and its context, if it says. Raises BackendError."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    base = completions_base(url)
    try:
        async with httpx2.AsyncClient(timeout=timeout, trust_env=False) as client:
            response = await client.get(f"{base}/models", headers=headers)
            response.raise_for_status()
            first = response.json()["data"][0]
            context = first.get("max_model_len") or first.get("context_length")
            return str(first["id"]), context if isinstance(context, int) else None
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BackendError(
            f"the upstream {base} does not list its models ({_say(error)}): is it running? If it "
            "has no such list, name the model with --upstream-model"
        ) from None


def open_gateway(
    url: str,
    *,
    model: str | None,
    context_tokens: int | None,
    tokenizer: Tokenizer | None,
    api_key: str | None = None,
) -> GatewayBackend:
    """A gateway to `url`, asking it for what is not given. Raises BackendError."""
    if model is None:
        model, found = anyio.run(_discover, url, api_key)
        context_tokens = context_tokens or found
    return GatewayBackend(
        url,
        model=model,
        context_tokens=context_tokens or _CONTEXT,
        tokenizer=tokenizer,
        api_key=api_key,
    )


async def _discover(url: str, api_key: str | None) -> tuple[str, int | None]:
    return await discover(url, api_key=api_key)


def completions_base(url: str) -> str:
    """The address below which `/completions` lies. Raises BackendError for no http address."""
    trimmed = url.strip().rstrip("/").removesuffix("/completions")
    if not re.match(r"https?://[^/\s@]+(/|$)", trimmed):
        raise BackendError(f"{url!r} is no http:// or https:// address (keys go elsewhere)")
    return trimmed if "/" in trimmed.split("://", 1)[1] else f"{trimmed}/v1"


def safe_text(segments: Iterable[Segment]) -> str:
    """A prompt as text in which only the protocol's own special tokens are spelled whole.

    In data, a zero-width space breaks them up: the reader of a text prompt could not tell them
    apart. Token ids need no such change.
    """
    return "".join(
        text if special else _SPELLED.sub("\\g<0>\u200b", text) for text, special, _ in segments
    )


async def _check(response: httpx2.Response) -> None:
    if response.status_code == 200:
        return
    raw = b""
    async for part in response.aiter_bytes():
        raw += part
        if len(raw) > 4096:
            break
    text = raw[:500].decode("utf-8", "replace")
    if response.status_code in (400, 413, 422):
        raise GenerationError(f"the upstream refused the request: {text}")
    if response.status_code in (429, 503):
        wait = response.headers.get("retry-after", "")
        raise Problem(
            response.status_code,
            f"the upstream has too much to do: {text}",
            code="overloaded",
            headers={"retry-after": wait} if _WAIT.fullmatch(wait) else {},
        )
    raise BackendError(f"the upstream answered {response.status_code}: {text}")


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an event stream."""
    async for line in response.aiter_lines():
        if len(line) > _LARGEST_LINE:
            raise BackendError("the upstream sent a line beyond all measure")
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise BackendError(f"the upstream sent no JSON: {data[:200]!r}") from None
        if not isinstance(chunk, dict):
            raise BackendError(f"the upstream sent no object: {data[:200]!r}")
        yield cast("dict[str, Any]", chunk)


class _Reader:
    """Turns chunks of an upstream into outputs."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.incremental_decoder() if tokenizer is not None else None
        self._prompt_tokens = prompt_tokens
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}
        self._begun = False

    def take(self, chunk: dict[str, Any]) -> list[Output]:
        """The outputs of one chunk. Raises BackendError for an error or an unreadable one."""
        if error := chunk.get("error"):
            raise BackendError(f"the upstream reported: {str(error)[:500]}")
        outputs: list[Output] = []
        try:
            if isinstance(chunk.get("usage"), dict):
                self._usage = chunk["usage"]
            if not self._begun:
                self._begun = True
                outputs.append(Prefilled(prompt_tokens=self._prompt_tokens))
            for choice in chunk.get("choices") or []:
                outputs += self._choice(choice)
        except (TypeError, AttributeError, ValueError) as error:
            raise BackendError(f"the upstream sent no completion: {str(chunk)[:200]}") from error
        return outputs

    def end(self) -> GenerationEnd:
        """The end. Raises BackendError when the stream broke off without a reason."""
        if self._finish is None:
            raise BackendError("the upstream's stream ended without a finish reason")
        found = self._usage.get("prompt_tokens_details")
        details = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        counts = (
            self._usage.get("prompt_tokens"),
            details.get("cached_tokens", self._usage.get("prompt_cache_hit_tokens")),
            self._usage.get("completion_tokens"),
        )
        prompt, cached, completion = (c if isinstance(c, int) else None for c in counts)
        return GenerationEnd(
            finish_reason=self._finish,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
        )

    def _choice(self, choice: dict[str, Any]) -> list[TokenOutput]:
        reason = choice.get("finish_reason")
        if reason is not None:
            if reason not in _FINISHES:
                raise BackendError(f"the upstream ended with {reason!r}, which is no end")
            self._finish = _FINISHES[reason]
        text, ids = choice.get("text") or "", choice.get("token_ids")
        if not isinstance(text, str):
            raise TypeError("text")
        if ids and self._decoder is not None and self._tokenizer is not None:
            return self._tokens(ids, choice.get("logprobs"))
        return [TokenOutput(token_id=None, text=text)] if text else []

    def _tokens(self, ids: list[int], logprobs: Any) -> list[TokenOutput]:
        assert self._tokenizer is not None
        assert self._decoder is not None
        values = (logprobs or {}).get("token_logprobs") or []
        tops = (logprobs or {}).get("top_logprobs") or []
        outputs: list[TokenOutput] = []
        for at, token in enumerate(ids):
            if not isinstance(token, int):
                raise TypeError("token_ids")
            is_end = token == self._tokenizer.eos_id
            text = self._decoder.flush() if is_end else self._decoder.push(token)
            value = values[at] if at < len(values) else None
            outputs.append(
                TokenOutput(
                    token_id=token,
                    text=text,
                    logprob=float(value) if value is not None else 0.0,
                    top=_top(tops[at] if at < len(tops) else None),
                )
            )
        return outputs


def _top(found: Any) -> tuple[tuple[int, float], ...]:
    pairs = [
        (int(match[1]), float(logprob))
        for name, logprob in (found or {}).items()
        if (match := _TOKEN_NAME.fullmatch(name))
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]

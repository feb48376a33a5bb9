"""How much the server costs per token: a mock engine, many clients, and the time of the process.

The mock gives one token to every running stream per step, as an engine with batches does. The
server runs in a process of its own, so that its processor time is that of the server and the mock
alone, without the clients'.

Paper: none (measurement).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from statistics import median
from typing import Any

from fathom.chat.tokenizer import Tokenizer
from fathom.errors import ServerError
from fathom.server.backend import (
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)

_WORDS = (" some", " words", " of", " a", " reply", ",", " one", " after", " the", " other", ".")
_TOKEN_ID = 300


class StepBackend:
    """A mock engine that gives every running stream one token per `step` seconds.

    Without a step, tokens come as fast as they are taken. The first one is the time it was made at,
    in nanoseconds of the monotonic clock, so that a client can say how long it took.
    """

    def __init__(self, tokenizer: Tokenizer, step: float) -> None:
        self._tokenizer = tokenizer
        self._step = step
        self._info = BackendInfo(name="mock", context_tokens=1 << 20, masks=False, shaping=False)
        self._next = asyncio.Event()
        self._running = 0
        self._clock: asyncio.Task[None] | None = None

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was given."""
        return self._tokenizer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """Give `max_tokens` tokens."""
        if self._clock is None and self._step:
            self._clock = asyncio.ensure_future(self._tick())
        yield Prefilled(prompt_tokens=len(request.prompt))
        for at in range(request.max_tokens):
            if self._step:
                await self._next.wait()
            else:
                await asyncio.sleep(0)
            text = _WORDS[at % len(_WORDS)] if at else f"{time.monotonic_ns()} "
            yield TokenOutput(token_id=_TOKEN_ID, text=text, logprob=-1.0)
        yield GenerationEnd(finish_reason="length")

    async def aclose(self) -> None:
        """End the clock."""
        if self._clock is not None:
            self._clock.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._step)
            waiting, self._next = self._next, asyncio.Event()
            waiting.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to measure: `streams` at once, each of `tokens` tokens, one per `step` seconds."""

    streams: int = 64
    tokens: int = 256
    step: float = 0.02
    api: str = "chat"


def measure(load: Load, *, bare: bool = False) -> dict[str, Any]:
    """Start a server, load it, and say what it took. Raises ServerError when it does not answer.

    `bare` loads a server that writes the same bytes and does nothing else: what the HTTP library,
    the event loop and the kernel take is in both.
    """
    command = [sys.executable, "-m", "fathom.server.load", str(load.step), *(["bare"] * bare)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline()
        if not line.strip().isdecimal():
            raise ServerError("the measured server did not start")
        return asyncio.run(_measure(load, int(line), process.pid))
    finally:
        process.terminate()
        process.wait(timeout=10)


async def _measure(load: Load, port: int, pid: int) -> dict[str, Any]:
    for _ in range(3):  # what is loaded on first use is no cost per token
        await _stream(load, port, 8)
    idle = _cpu_seconds(pid)
    started = time.perf_counter()
    streams = [_stream(load, port, load.tokens) for _ in range(load.streams)]
    results = await asyncio.gather(*streams)
    wall = time.perf_counter() - started
    user, system = (after - before for after, before in zip(_cpu_seconds(pid), idle, strict=True))
    total = load.streams * load.tokens
    firsts = sorted(first for first, _ in results)
    seen = sum(count for _, count in results)
    if seen != total:
        raise ServerError(f"{seen} tokens arrived of {total}")
    return {
        "api": load.api,
        "streams": load.streams,
        "tokens_per_stream": load.tokens,
        "step_ms": 1e3 * load.step,
        "wall_s": wall,
        "tokens_per_s": total / wall,
        "server_cpu_us_per_token": 1e6 * (user + system) / total,
        "of_which_kernel_us": 1e6 * system / total,
        "first_byte_ms": {
            "median": 1e3 * median(firsts),
            "p99": 1e3 * firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
            "max": 1e3 * firsts[-1],
        },
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


_PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
_MARKS = {"chat": b'"content":"', "messages": b'"text":"', "responses": b'"delta":"'}


def _request(load: Load, tokens: int) -> bytes:
    message = [{"role": "user", "content": "Say something."}]
    body: dict[str, Any] = {"model": "mock", "stream": True, "thinking": {"type": "disabled"}}
    if load.api == "responses":
        body |= {"input": message, "max_output_tokens": tokens}
    else:
        body |= {"messages": message, "max_tokens": tokens}
    data = json.dumps(body).encode()
    head = (
        f"POST {_PATHS[load.api]} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _stream(load: Load, port: int, tokens: int) -> tuple[float, int]:
    """Seconds from the first token to its bytes here, and the number of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(load, tokens))
    mark, first, count, rest = _MARKS[load.api], -1.0, 0, b""
    if load.api == "chat":
        names = b'"delta":{"content":"'
    elif load.api == "messages":
        names = b'"type":"text_delta"'
    else:
        names = b"event: response.output_text.delta"
    while data := await reader.read(1 << 16):
        now = time.monotonic_ns()
        if not data:
            break
        data = rest + data
        end = data.rfind(b"\n\n") + 2
        whole, rest = (data[:end], data[end:]) if end > 1 else (b"", data)
        found = whole.count(names)
        if first < 0 and found:
            at = whole.index(names)
            number = whole[whole.index(mark, at) + len(mark) :]
            first = (now - int(number.split(b" ", 1)[0])) / 1e9
        count += found
    writer.close()
    if first < 0:
        raise ServerError("a stream brought no token")
    return first, count


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time of a process so far, its own and the kernel's for it."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


def _serve(step: float, *, bare: bool) -> None:
    from pathlib import Path

    from fathom.server.app import create_app
    from fathom.server.run import make_server, open_listener
    from fathom.server.settings import Limits, Settings

    tokenizer = Tokenizer.load(Path(__file__).resolve().parents[1] / "assets" / "nano")
    settings = Settings(port=0, limits=Limits(running=4096, waiting=4096, connections=8192))
    backend = StepBackend(tokenizer, step)
    app: Any = _bare_app(backend) if bare else create_app(backend, settings)
    listener = open_listener(settings)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    make_server(app, settings).run(sockets=[listener])


def _bare_app(backend: StepBackend) -> Any:
    """Chat Completions of `backend` without parsing, accounts, limits or JSON."""
    head = (
        '{"id":"chatcmpl-000000000000000000000000","object":"chat.completion.chunk",'
        '"created":1700000000,"model":"mock","choices":[{"index":0,"delta":{"content":"'
    )
    start, end = f"data: {head}".encode(), b'"},"logprobs":null,"finish_reason":null}]}\n\n'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        request = GenerationRequest(prompt=[0], max_tokens=json.loads(body)["max_tokens"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for output in backend.generate(request):
            if isinstance(output, TokenOutput):
                data = start + output.text.encode() + end
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


if __name__ == "__main__":
    _serve(float(sys.argv[1]), bare="bare" in sys.argv[2:])

"""LocalBackend: many completions of an event loop through one engine."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fathom.chat import Tokenizer
from fathom.chat.generation import (
    GenerationEnd,
    GenerationRequest,
    Prefilled,
    Shaping,
    TokenOutput,
)
from fathom.engine import LLM
from fathom.engine.backend import LocalBackend
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.sampler import SamplingParams
from fathom.errors import BackendError, GenerationError
from tests.engine.helpers import model, prompt


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = Tokenizer.train(["some words to learn from, and a few more words"] * 3, 400)
    return LLM(model(), tokenizer)


def ask(seed: int, **changes: object) -> GenerationRequest:
    settings: dict[str, object] = {
        "prompt": prompt(40 + seed, seed),
        "max_tokens": 12,
        "seed": seed,
    }
    return GenerationRequest(**(settings | changes))  # type: ignore[arg-type]


async def collect(backend: LocalBackend, request: GenerationRequest) -> list[object]:
    return [item async for item in backend.generate(request)]


def test_together_they_give_what_each_gives_alone(llm: LLM) -> None:
    backend = LocalBackend(llm)
    results: dict[int, list[object]] = {}

    async def main() -> None:
        async def one(seed: int) -> None:
            results[seed] = await collect(backend, ask(seed, top_logprobs=2))

        async with anyio.create_task_group() as group:
            for seed in range(6):
                group.start_soon(one, seed)
        await backend.aclose()

    anyio.run(main)
    for seed, items in results.items():
        alone = LLM(llm.model, llm.tokenizer).generate(prompt(40 + seed, seed), 12, seed=seed)
        first, *tokens, end = items
        assert isinstance(first, Prefilled)
        assert first.prompt_tokens == 40 + seed
        assert isinstance(end, GenerationEnd)
        assert (end.finish_reason, end.completion_tokens) == (alone.finish_reason, len(tokens))
        assert all(isinstance(t, TokenOutput) and len(t.top) == 2 for t in tokens)
        assert [t.token_id for t in tokens] == alone.token_ids  # type: ignore[attr-defined]
        assert "".join(t.text for t in tokens) == alone.text  # type: ignore[attr-defined]


def test_closing_a_generator_frees_its_memory(llm: LLM) -> None:
    backend = LocalBackend(llm)

    async def main() -> None:
        run = backend.generate(ask(1, max_tokens=1500))
        await anext(run)
        await run.aclose()
        await collect(backend, ask(2, max_tokens=2))
        assert "fathom_engine_running_requests 0.0" in await backend.metrics_text()
        await backend.aclose()

    anyio.run(main)
    assert llm.engine.memory.slots.free == llm.engine.memory.slots.count


def test_refusals_and_failures_reach_their_caller_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(llm)

    async def refused() -> None:
        with pytest.raises(GenerationError, match="context"):
            await collect(backend, ask(1, prompt=prompt(3000)))
        with pytest.raises(GenerationError, match="temperature"):
            await collect(backend, ask(1, temperature=-1.0))
        assert len(await collect(backend, ask(1, max_tokens=3))) == 5

    async def failed() -> None:
        with pytest.raises(BackendError, match="the model failed"):
            await collect(backend, ask(1))

    async def again() -> None:
        assert len(await collect(backend, ask(1, max_tokens=3))) == 5
        await backend.aclose()

    anyio.run(refused)
    with monkeypatch.context() as m:
        m.setattr(llm.engine.runner, "forward", lambda batch: 1 / 0)
        llm.engine.cache.clear()
        anyio.run(failed)
    assert not list(llm.engine.requests)  # what failed was let go
    anyio.run(again)
    anyio.run(again)  # also right behind the end of the engine's thread


def test_no_completion_is_lost_between_two_engine_threads(llm: LLM) -> None:
    """A request that comes while the thread is ending is done by it or by the next."""
    backend = LocalBackend(llm)

    async def main() -> None:
        for seed in range(40):
            await backend.aclose()
            with anyio.fail_after(60):
                assert len(await collect(backend, ask(seed, max_tokens=1))) == 3

    anyio.run(main)


def interrupted(llm: LLM, folder: Path, **changes: object) -> list[int]:
    """Tokens of a completion whose process is gone before its end; nobody gave a seed."""
    asked = replace(ask(1), **changes)  # type: ignore[arg-type]
    engine = Engine(llm.model, EngineConfig(wal=folder, cache_tokens=2048))
    request = engine.submit(
        list(asked.prompt),
        SamplingParams(
            max_tokens=300,
            stop_token_ids=(llm.config.eos_token_id,),
            **asked.shaping.changes(),
        ),
        mask=asked.mask,
    )
    while len(request.output) < 5:
        engine.step()
    engine.close()
    return request.tokens[len(request.prompt) :]


def test_an_interrupted_completion_goes_on_for_who_asks_the_same(llm: LLM, tmp_path: Path) -> None:
    first, second = interrupted(llm, tmp_path), interrupted(llm, tmp_path)
    interrupted(llm, tmp_path, mask=Everything())
    third = interrupted(llm, tmp_path, mask=Everything("x"))
    shaping = Shaping(logit_bias={7: 2.5, 9: -100.0}, frequency_penalty=0.5)
    fourth = interrupted(llm, tmp_path, shaping=shaping)
    llm = LLM(llm.model, llm.tokenizer, engine=EngineConfig(wal=tmp_path, cache_tokens=2048))
    backend = LocalBackend(llm)

    async def ids(**changes: object) -> list[int]:
        request = replace(ask(1, max_tokens=300), **({"seed": None} | changes))  # type: ignore[arg-type]
        items = await collect(backend, request)
        return [item.token_id for item in items if isinstance(item, TokenOutput)]  # type: ignore[misc]

    async def main() -> None:
        other, masked = await ids(seed=7), await ids(mask=Everything())
        assert (await ids(mask=Everything("y")))[:5] != third
        assert (await ids(mask=Everything("x")))[:5] == third
        assert (await ids(shaping=replace(shaping, logit_bias={7: 2.0})))[:5] != fourth
        assert (await ids(shaping=shaping))[:5] == fourth
        found = [await ids() for _ in range(3)]
        assert sorted(f[:5] for f in found[:2]) == sorted([first, second])
        assert all(f[:5] not in (first, second) for f in (other, masked, found[2]))
        await backend.aclose()

    anyio.run(main)
    deadline = time.monotonic() + 10  # the engine's thread forgets what it has handed out
    while len(list(tmp_path.glob("*.wal"))) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    (left,) = tmp_path.glob("*.wal")  # the masked one: nobody remembers its mask
    os.utime(left, (1, 1))
    engine = Engine(llm.model, EngineConfig(wal=tmp_path, cache_tokens=2048))
    (revived,) = engine.interrupted()
    LocalBackend(llm).prepare()
    assert list(tmp_path.glob("*.wal")) == []
    assert revived.rules == ""


class Everything:
    """A mask that allows all tokens."""

    def __init__(self, rules: str = "") -> None:
        self.rules = rules

    def allowed(self) -> None:
        return None

    def accept(self, token: int) -> None:
        pass

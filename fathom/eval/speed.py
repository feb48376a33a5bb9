"""How fast a model decodes here: rounds in which the sides take turns, and the floor below them.

A machine's speed drifts, so every round measures every side once, and sides are compared within a
round. A `Side` is one implementation with its weights loaded; those in other processes are driven
over a pipe (see `ProcessSide`).

Paper: none (measurement).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

import numpy as np
import torch

from fathom.engine import LLM
from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.errors import FathomError, MissingDependency


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds for the prompt, and for `decoded` tokens after it."""

    prefill: float
    decode: float
    decoded: int


class Side(Protocol):
    """One implementation under measurement."""

    name: str

    def measure(self, prompt: list[int], following: list[int], threads: int) -> Timing:
        """Feed the prompt at once, then `following` token by token."""
        ...


class ModelSide:
    """fathom's model in the engine's compiled rows, fed token by token: no sampling, no text."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name, self._llm = name, llm

    def measure(self, prompt: list[int], following: list[int], threads: int) -> Timing:
        """As `Side.measure`."""
        torch.set_num_threads(threads)
        room = len(prompt) + len(following)
        engine = Engine(self._llm.model, EngineConfig(cache_tokens=room, max_sequences=1))
        runner, step = engine.runner, engine.config.budget.tokens
        engine.memory.tables[0] = torch.arange(engine.memory.tables.shape[1])
        start = time.perf_counter()
        for at in range(0, len(prompt), step):
            runner.forward(Batch.of([Piece(slot=0, start=at, tokens=prompt[at : at + step])]))
        runner.logits([(len(prompt) - 1) % step])
        middle = time.perf_counter()
        for i, token in enumerate(following, len(prompt)):
            runner.forward(Batch.of([Piece(slot=0, start=i, tokens=[token])]))
            runner.logits([0])
        end = time.perf_counter()
        return Timing(prefill=middle - start, decode=end - middle, decoded=len(following))


class GenerateSide:
    """What a caller of `LLM.stream` gets: the same with sampling, text and the prefix store."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name, self._llm = name, llm

    def measure(self, prompt: list[int], following: list[int], threads: int) -> Timing:
        """As `Side.measure`, but the model follows with its own tokens, as many."""
        torch.set_num_threads(threads)
        fresh = LLM(self._llm.model, self._llm._tokenizer)  # no prefix is known yet
        _ = fresh.engine  # weights are packed before the clock starts
        times = [time.perf_counter()]
        for _ in fresh.stream(prompt, max_tokens=len(following) + 1, temperature=0.0):
            times.append(time.perf_counter())
        decoded = len(times) - 2
        if decoded < 1:
            raise FathomError("the model ended its text at once: choose another --context")
        return Timing(prefill=times[1] - times[0], decode=times[-1] - times[1], decoded=decoded)


class ProcessSide:
    """An implementation in a process of its own: one JSON object per line in, one out.

    Raises MissingDependency when the process says what it lacks, FathomError when it dies.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        self.versions: dict[str, str] = self._receive()["versions"]

    def measure(self, prompt: list[int], following: list[int], threads: int) -> Timing:
        """As `Side.measure`."""
        return Timing(**self._ask(prompt=prompt, following=following, threads=threads))

    def logits(self, tokens: list[int], file: Path) -> np.ndarray:
        """Logits of every position, float32 [tokens, vocab]; `file` is where to hand them over."""
        self._ask(tokens=tokens, file=str(file))
        return np.load(file)

    def close(self) -> int:
        """End the process; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        return self._process.wait(timeout=60)

    def _ask(self, **request: Any) -> dict[str, Any]:
        pipe = _pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise FathomError(f"{self.name} ended with exit code {self.close()}; see above")
        answer = json.loads(line)
        if "missing" in answer:
            self.close()
            raise MissingDependency(answer["missing"])
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        """The spread of `values`."""
        return cls(median=median(values), low=min(values), high=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One side at one number of threads, over all rounds."""

    side: str
    threads: int
    prompt: int
    timings: tuple[Timing, ...]

    @property
    def decode_rates(self) -> list[float]:
        """Tokens decoded per second, round by round."""
        return [t.decoded / t.decode for t in self.timings]

    @property
    def decode(self) -> Rate:
        """Tokens decoded per second."""
        return Rate.of(self.decode_rates)

    @property
    def prefill(self) -> Rate:
        """Tokens of the prompt per second."""
        return Rate.of([self.prompt / t.prefill for t in self.timings])

    def to_json(self) -> dict[str, Any]:
        """This result for `--json`."""
        return {
            "side": self.side,
            "threads": self.threads,
            "decode_tokens_per_s": asdict(self.decode),
            "prefill_tokens_per_s": asdict(self.prefill),
            "decode_rounds": self.decode_rates,
        }


def take_turns(
    sides: Sequence[Side],
    prompt: list[int],
    following: list[int],
    threads: Sequence[int],
    rounds: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> list[Result]:
    """Measure every side at every number of threads once per round, after one round to warm up."""
    timings: dict[tuple[str, int], list[Timing]] = {}
    for number in range(rounds + 1):
        on_round(number)
        for count in threads:
            for side in sides:
                timing = side.measure(prompt, following, count)
                if number:
                    timings.setdefault((side.name, count), []).append(timing)
    return [
        Result(side=side, threads=count, prompt=len(prompt), timings=tuple(of_one))
        for (side, count), of_one in sorted(timings.items())
    ]


def best(results: Sequence[Result], side: str) -> Result:
    """The result of `side` at the number of threads that suits it best."""
    return max((r for r in results if r.side == side), key=lambda r: r.decode.median)


def ratio(results: Sequence[Result], side: str, other: str) -> Rate:
    """How many times faster `side` decodes than `other`, each at its best, within each round."""
    pairs = zip(best(results, side).decode_rates, best(results, other).decode_rates, strict=True)
    return Rate.of([a / b for a, b in pairs])


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """The same ids on every machine; the first 300, special tokens and bytes, are left out."""
    first = min(300, vocab_size // 2)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first, vocab_size, (count,), generator=generator).tolist()


def copy_rate(megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second that one thread reads and writes when it copies a large array."""
    source = np.ones(megabytes * 2**20, np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(seconds)


def machine() -> dict[str, Any]:
    """What a number depends on: processor, cores, load and versions."""
    names = [
        line.partition(":")[2].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

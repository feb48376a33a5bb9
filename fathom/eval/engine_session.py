"""A saved session of any length, taken up by another process that has nothing in memory.

The process that writes it says what its next token would be and is killed; the one that resumes it
begins with the files dropped from the page cache, and must come to the same token, bit for bit.

Paper: §3.5.2 (on-disk KV cache storage).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.checkpoints import Checkpoint
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.sampler import Drawn, Sampler, SamplingParams
from fathom.errors import FathomError
from fathom.eval.speed import random_tokens
from fathom.model.transformer import Transformer

PATTERN = 2048  # tokens of real slabs that long contexts are made of
NEXT = 7  # what the session's user says next
_CHILD = """
import json, sys
from pathlib import Path
import torch
import fathom
from fathom.eval import engine_session
torch.set_num_threads(int(sys.argv[5]))
step = getattr(engine_session, sys.argv[1])
print(json.dumps(step(fathom.load(sys.argv[2]).model, Path(sys.argv[3]), int(sys.argv[4]))))
sys.stdout.flush()
sys.stdin.read()
"""


def write_session(model: Transformer, folder: Path, tokens: int) -> dict[str, Any]:
    """Save a session of `tokens` tokens, made of copies of real slabs, and go on with it.

    The last tokens are computed, so that the checkpoint is a real one. Returns what saving took and
    the next token with its log-probability.
    """
    engine = Engine(model, _config(tokens, folder))
    ids = session_tokens(model, tokens)
    memory, cache = engine.memory, engine.cache
    full, pattern = tokens // SLAB_TOKENS, PATTERN // SLAB_TOKENS
    chain, slabs = cache.chain(ids), [memory.slabs.take() for _ in range(full)]
    memory.tables[0, :full] = torch.tensor(slabs, dtype=torch.int32)
    for at in range(0, PATTERN, 1024):
        engine.runner.forward(Batch.of([Piece(slot=0, start=at, tokens=ids[at : at + 1024])]))
    for i in range(pattern, full):
        memory.slabs.data[slabs[i]] = memory.slabs.data[slabs[i % pattern]]
    last = full * SLAB_TOKENS
    piece = Piece(slot=0, start=last - 1024, tokens=ids[last - 1024 : last], known=last)
    engine.runner.forward(Batch.of([piece]))
    for name, slab in zip(chain, slabs, strict=True):
        cache.keep_slab(name, slab)
    state = memory.slots.read(0, last)
    cache.checkpoints.keep(chain[-1], Checkpoint(position=last, tail=(), state=state, entries=b""))
    start = time.perf_counter()
    engine.save_session(ids)
    seconds = time.perf_counter() - start
    assert cache.disk is not None
    size = cache.disk.size
    # By the runner alone: a request would leave what it computed on disk.
    engine.runner.forward(Batch.of([Piece(slot=0, start=last, tokens=[NEXT])]))
    drawn = Sampler(SamplingParams(temperature=0.0)).pick(engine.runner.logits([0])[1][0])
    return {
        "seconds": seconds,
        "bytes": float(size),
        "bytes_per_token": size / tokens,
        **_drawn(drawn),
    }


def session_tokens(model: Transformer, tokens: int) -> list[int]:
    """The tokens of that session."""
    pattern = random_tokens(model.config.vocab_size, PATTERN)
    return (pattern * (tokens // PATTERN + 1))[:tokens]


def resume_session(model: Transformer, folder: Path, tokens: int) -> dict[str, Any]:
    """Seconds from the request to its first new token, and which token that is.

    The engine is made and has computed something before the clock starts, as a server's has;
    `start` says how long that took.
    """
    begun = time.perf_counter()
    engine = Engine(model, _config(tokens, folder))
    engine.run([engine.submit([5, 6], SamplingParams(max_tokens=1))])
    start = time.perf_counter()
    ids = session_tokens(model, tokens // SLAB_TOKENS * SLAB_TOKENS)
    request = engine.submit([*ids, NEXT], SamplingParams(temperature=0.0, max_tokens=1))
    engine.run([request])
    if request.error is not None:
        raise request.error
    return {
        "start": start - begun,
        "first_token": time.perf_counter() - start,
        "cached_tokens": request.cached_tokens,
        **_drawn(request.output[0]),
    }


def drop_pages(folder: Path) -> str:
    """Take the files below a folder out of the page cache; how it was done."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "drop_caches"
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    return "posix_fadvise"


def resume_after_kill(
    model: str, folder: Path, tokens: int, threads: int, rounds: int
) -> dict[str, Any]:
    """Write a session in one process, kill it, and take it up in others, `rounds` times.

    Raises FathomError when one of them comes to another token or log-probability.
    """
    saved = _in_process("write_session", model, folder, tokens, threads)
    resumed, dropped, files = [], "", set(folder.rglob("*"))
    for _ in range(rounds):
        dropped = drop_pages(folder)
        resumed.append(_in_process("resume_session", model, folder, tokens, threads))
        for added in set(folder.rglob("*")) - files:  # what it computed, which would be found next
            added.unlink()
    for found in resumed:
        if (found["token"], found["logprob"]) != (saved["token"], saved["logprob"]):
            raise FathomError(f"the resumed session goes on differently: {found} after {saved}")
    return {"tokens": tokens, "page_cache": dropped, "saved": saved, "resumed": resumed}


def _in_process(step: str, model: str, folder: Path, tokens: int, threads: int) -> Any:
    """The answer of a step in a process of its own, which is then killed."""
    command = [sys.executable, "-c", _CHILD, step, model, str(folder), str(tokens), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        line = p.stdout.readline()
        p.send_signal(signal.SIGKILL)
    if not line:
        raise FathomError(f"{step} failed; see above")
    return json.loads(line)


def _config(tokens: int, folder: Path) -> EngineConfig:
    return EngineConfig(cache_tokens=tokens + 64 * SLAB_TOKENS, disk=folder)


def _drawn(drawn: Drawn) -> dict[str, Any]:
    return {"token": drawn.token, "logprob": float(drawn.logprob).hex()}

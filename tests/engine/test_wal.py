"""The write-ahead log: whatever moment a process is killed at, no token is lost or different."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.engine.wal import RECORD, WriteAheadLog
from fathom.errors import CacheError
from fathom.model import Transformer
from tests.engine.helpers import bits, engine, finish, model, prompt, sampled

KILLS = int(os.environ.get("FATHOM_KILLS", "10"))
# Forks a process per line on its standard input: each takes up what the last one left. A GPU does
# not survive a fork: there the process itself is the only one.
WRITER = """
import os, sys
from tests.engine.helpers import engine, model, prompt, sampled
net = model(device=sys.argv[3])
warm = engine(net)
warm.run([warm.submit(prompt(5), sampled(2))])
for line in sys.stdin:
    if sys.argv[3] == "cpu" and os.fork():
        os.wait()
        print("ended", flush=True)
        continue
    served = engine(net, wal=sys.argv[1], disk=sys.argv[2] or None)
    requests = served.recover() or [
        served.submit(prompt(300 + i, i), sampled(60, seed=i), request_id=f"r{i}")
        for i in range(2)
    ]
    print("ready", os.getpid(), flush=True)
    shown = {r.id: 0 for r in requests}
    while not all(r.finished for r in requests):
        served.step()
        for r in requests:
            for drawn in r.output[shown[r.id]:]:
                print(r.id, shown[r.id], drawn.token, drawn.logprob.hex(), flush=True)
                shown[r.id] += 1
    print("done", flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def net(device: str) -> Transformer:
    return model(device=device)


def uninterrupted(net: Transformer) -> dict[str, list[Drawn]]:
    served = engine(net)
    runs = [served.submit(prompt(300 + i, i), sampled(60, seed=i)) for i in range(2)]
    finish(served, *runs)
    return {f"r{i}": list(bits(run)) for i, run in enumerate(runs)}


def test_a_token_takes_16_bytes_at_most() -> None:
    """With the record of the end, from the seventh token on."""
    assert 8 * RECORD.size <= 7 * 16


@contextlib.contextmanager
def writer(device: str, log: Path, folder: str) -> Iterator[subprocess.Popen[str]]:
    """The process that writes, or on the CPU makes processes that do."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(log), folder, device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def interrupted(
    process: subprocess.Popen[str], seconds: float, shown: dict[tuple[str, int], tuple[str, str]]
) -> bool:
    """Let a life begin, kill it after a while, and note what it showed; whether it was done."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("next\n")
    process.stdin.flush()
    pid = int(process.stdout.readline().split()[1])
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it had ended by itself
        os.kill(pid, signal.SIGKILL)
    done = False
    while (line := process.stdout.readline()) and not line.endswith("ended\n"):
        done = done or line == "done\n"
        parts = line.split()
        if len(parts) != 4 or done:
            continue  # torn by the kill
        name, number, token, logprob = parts
        shown.setdefault((name, int(number)), (token, logprob))
        assert shown[name, int(number)][0] == token
    return done


@pytest.mark.timeout(600)
@pytest.mark.parametrize("disk", [False, True])
def test_kill_at_any_moment(net: Transformer, device: str, tmp_path: Path, disk: bool) -> None:
    """FATHOM_KILLS=200 is the long run; each kill interrupts a process that continues the last."""
    expected = uninterrupted(net)
    generator = random.Random(3 + disk)
    shown: dict[tuple[str, int], tuple[str, str]] = {}
    log, kills = tmp_path / "log", max(1, KILLS // 2)
    folder = str(tmp_path / "cache") if disk else ""

    def forget() -> None:
        for path in log.glob("*.wal"):
            path.unlink()

    if device == "cpu":
        with writer(device, log, folder) as process:
            for number in range(10 * kills):
                if number >= kills and shown:  # a slow machine may show nothing before it is killed
                    break
                if interrupted(process, generator.uniform(0, 0.2), shown):
                    forget()
    else:  # a life begins with seconds of loading
        for _ in range(max(2, kills // 2)):
            with writer(device, log, folder) as process:
                if interrupted(process, generator.uniform(0.1, 1.0), shown):
                    forget()
    served = engine(net, wal=log)
    for request in served.recover():
        finish(served, request)
        assert [d.token for d in bits(request)] == [d.token for d in expected[request.id]]
    assert shown
    for (name, number), (token, logprob) in shown.items():
        drawn = expected[name][number]
        assert token == str(drawn.token)
        assert float.fromhex(logprob) == pytest.approx(drawn.logprob, rel=1e-6)


def started(net: Transformer, folder: Path, tokens: int = 6) -> tuple[Engine, Request]:
    served = engine(net, wal=folder)
    request = served.submit(prompt(300), sampled(20), request_id="a/b: c")
    while len(request.output) < tokens:
        served.step()
    return served, request


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("cut", [16, 97, 512])
def test_a_restart_continues_with_the_same_bits(
    net: Transformer, tmp_path: Path, batch: int, cut: int
) -> None:
    """The last six cells of the matrix in test_engine.py."""
    from fathom.engine.scheduler import Budget

    alone = engine(net)
    whole = alone.submit(prompt(300), sampled(20))
    finish(alone, whole)
    budget = Budget(tokens=cut, beside_streams=cut)
    first = engine(net, wal=tmp_path, budget=budget)
    runs = [first.submit(prompt(300 + 7 * i, i), sampled(20)) for i in range(batch)]
    while len(runs[0].output) < 5:
        first.step()
    first.close()
    later = engine(net, wal=tmp_path, budget=budget)
    recovered = {r.id: r for r in later.recover()}
    assert recovered.keys() == {r.id for r in runs}
    finish(later, *recovered.values())
    found = bits(recovered[runs[0].id])
    assert [d.token for d in found] == [d.token for d in whole.output]
    assert found[5:] == whole.output[5:]


def test_a_torn_end_at_every_byte(net: Transformer, tmp_path: Path) -> None:
    served, request = started(net, tmp_path)
    served.close()
    path = next(tmp_path.glob("*.wal"))
    whole = path.read_bytes()
    log = WriteAheadLog(tmp_path, served.cache.root)
    header = len(whole) - RECORD.size * len(request.output)
    for size in range(header, len(whole) + 1):
        path.write_bytes(whole[:size])
        (logged,), problems = log.read()
        kept = (size - header) // RECORD.size
        assert problems == []
        assert [d.token for d in logged.output] == [d.token for d in request.output[:kept]]
    for size in range(0, header, 13):
        path.write_bytes(whole[:size])
        found, problems = log.read()
        assert found == []
        assert len(problems) == 1
    for at in range(header, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 16
        path.write_bytes(bytes(changed))
        (logged,), _ = log.read()
        assert len(logged.output) == (at - header) // RECORD.size


def test_a_torn_record_is_overwritten(net: Transformer, tmp_path: Path) -> None:
    served, request = started(net, tmp_path)
    served.close()
    path = next(tmp_path.glob("*.wal"))
    path.write_bytes(path.read_bytes()[:-7])
    later = engine(net, wal=tmp_path)
    (again,) = later.recover()
    assert len(again.output) == len(request.output) - 1
    finish(later, again)
    (logged,), problems = WriteAheadLog(tmp_path, later.cache.root).read()
    assert problems == []
    assert logged.finish_reason == "length"
    assert [d.token for d in logged.output] == [d.token for d in again.output]


def test_finished_requests_are_told_and_forgotten(net: Transformer, tmp_path: Path) -> None:
    served = engine(net, wal=tmp_path)
    request = served.submit([5, 6], sampled(3), request_id="x")
    finish(served, request)
    later = engine(net, wal=tmp_path)
    (again,) = later.recover()
    assert (again.finish_reason, len(again.output)) == ("length", 3)
    assert later.requests == []
    assert later.wal is not None
    later.wal.forget("x")
    assert list(tmp_path.glob("*.wal")) == []


def test_every_setting_survives(net: Transformer, tmp_path: Path) -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2,
        frequency_penalty=0.3, presence_penalty=-0.2, logit_bias={7: 2.5, 9: -100.0},
        max_tokens=15, top_logprobs=2, stop_token_ids=(3, 4),
    )  # fmt: skip
    served = engine(net, wal=tmp_path)
    request = served.submit(prompt(40), params, priority=3)
    whole_engine = engine(net)
    from dataclasses import replace

    whole = whole_engine.submit(prompt(40), replace(params, seed=request.sampler.seed))
    finish(whole_engine, whole)
    while len(request.output) < 4:
        served.step()
    served.close()
    later = engine(net, wal=tmp_path)
    (again,) = later.recover()
    assert again.params == replace(params, seed=request.sampler.seed)
    assert again.priority == 3
    finish(later, again)
    assert [d.token for d in again.output] == [d.token for d in whole.output]
    assert again.output[4:] == whole.output[4:]


class Even:
    """Allows even tokens; counts what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def allowed(self) -> bytes:
        return b"\x55" * 50

    def accept(self, token: int) -> None:
        self.told.append(token)


def test_masks_are_given_again(net: Transformer, tmp_path: Path) -> None:
    served = engine(net, wal=tmp_path)
    request = served.submit(prompt(40), sampled(12), mask=Even(), request_id="m")
    while len(request.output) < 4:
        served.step()
    served.close()
    mask = Even()
    later = engine(net, wal=tmp_path)
    (again,) = later.recover(lambda name: (mask, None))
    finish(later, again)
    assert mask.told == [d.token for d in again.output]
    assert all(token % 2 == 0 for token in mask.told)
    without = WriteAheadLog(tmp_path, later.cache.root)
    without.forget("m")
    served = engine(net, wal=tmp_path)
    request = served.submit(prompt(40), sampled(12), mask=Even(), request_id="m")
    served.step()
    served.close()
    (lost,) = engine(net, wal=tmp_path).recover()
    assert lost.finish_reason == "error"
    assert "mask" in str(lost.error)


def test_foreign_files_are_left_alone(
    net: Transformer, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.wal").write_bytes(b"something else")
    other = engine(model(seed=2, device=device), wal=tmp_path)
    other.submit([5, 6], sampled(50), request_id="other")
    other.close()
    served = engine(net, wal=tmp_path)
    assert served.recover() == []
    assert "another model" in caplog.text
    assert "no log of fathom" in caplog.text
    assert len(list(tmp_path.glob("*.wal"))) == 2
    with pytest.raises(CacheError, match="another request"):
        served.submit([7], sampled(3), request_id="other")


def test_a_log_that_cannot_be_written_ends_its_request(
    net: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine(net, wal=tmp_path)
    bad, good = served.submit([5, 6], sampled(5)), served.submit([7, 8], sampled(5))
    append = served.wal.append  # type: ignore[union-attr]

    def full(request: Request, *rest: object) -> None:
        if request is bad:
            raise CacheError("the log cannot be written: No space left on device")
        append(request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(served.wal, "append", full)
    finish(served, good)
    assert bad.finish_reason == "error"
    assert bad.output == []  # nothing was shown that is not in the log
    assert len(good.output) == 5


def test_no_log_nothing_to_recover(net: Transformer) -> None:
    with pytest.raises(CacheError, match="no write-ahead log"):
        engine(net).recover()

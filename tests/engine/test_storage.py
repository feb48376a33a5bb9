"""Slabs and checkpoints in memory and files: found again, never served when damaged."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from fathom.engine import disk_cache
from fathom.engine.checkpoints import (
    Checkpoint,
    decode_checkpoint,
    encode_checkpoint,
)
from fathom.engine.engine import Engine
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.request import Request
from fathom.engine.sampler import Drawn
from fathom.errors import CacheError
from fathom.model import Transformer
from tests.engine.helpers import REPLAY, bits, engine, finish, greedy, model, prompt, sampled

LENGTH = 700


@pytest.fixture(scope="module")
def net(device: str) -> Transformer:
    return model(device=device)


@pytest.fixture(scope="module")
def expected(net: Transformer) -> list[Drawn]:
    alone = engine(net, checkpoint_spacing=0)
    return list(bits(serve(alone)))


def serve(of: Engine, length: int = LENGTH, **settings: object) -> Request:
    request = of.submit(prompt(length), sampled(8), **settings)  # type: ignore[arg-type]
    finish(of, request)
    return request


@pytest.fixture
def stored(net: Transformer, tmp_path: Path) -> Path:
    """A cache folder that one engine has filled and left."""
    serve(engine(net, disk=tmp_path, checkpoint_spacing=512))
    return tmp_path


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*/{kind}-*"))


def test_a_restart_finds_everything(net: Transformer, stored: Path, expected: list[Drawn]) -> None:
    later = engine(net, disk=stored)
    request = serve(later)
    assert request.cached_tokens == LENGTH
    assert bits(request) == expected
    assert later.cache.stats.disk == 2 * SLAB_TOKENS


def test_a_conversation_goes_on_from_where_its_turn_ended(net: Transformer, tmp_path: Path) -> None:
    """Tools answer, the user asks again: every turn adds to the last, branches included."""
    served = engine(net, checkpoint_spacing=0)
    history, given, known = prompt(600), 0, 0
    for turn in range(8):
        request = served.submit(history, greedy(20))
        finish(served, request)
        given += len(history)
        known += request.cached_tokens
        assert turn == 0 or len(history) - request.cached_tokens <= 1 + 15
        history = request.tokens + prompt(15, seed=turn)
    branch = served.submit(history[:-15] + prompt(15, seed=99), greedy(4))
    finish(served, branch)
    assert branch.cached_tokens == len(history) - 15 - 1
    assert known / (given - 600 - 8 * 15) > 0.98  # of what could have been known


@pytest.mark.parametrize("spacing", [0, 256, 512])
def test_spacing_decides_how_much_is_computed_again(net: Transformer, spacing: int) -> None:
    served = engine(net, checkpoint_spacing=spacing, cache_tokens=8192)
    serve(served, 1000)
    served.cache.openings.clear()  # a shared opening would get a checkpoint of its own
    request = served.submit([*prompt(1000)[:900], 5, 6], greedy(4))
    finish(served, request)
    assert request.cached_tokens == {0: 768 - REPLAY, 256: 768, 512: 768 - REPLAY}[spacing]
    cold = engine(net)
    same = cold.submit([*prompt(1000)[:900], 5, 6], greedy(4))
    finish(cold, same)
    assert bits(request) == bits(same)


@pytest.mark.parametrize("kind", ["slab", "state"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "gone"])
def test_damaged_files_are_reported_and_computed_again(
    net: Transformer,
    stored: Path,
    expected: list[Drawn],
    kind: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    later = engine(net, disk=stored)
    for path in files(stored, kind):
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 4
        path.unlink()
        if damage != "gone":
            keep = {
                "flip": bytes(data),
                "cut": bytes(data[:-9]),
                "empty": b"",
                "foreign": b"x" * 999,
            }
            path.write_bytes(keep[damage])
    with caplog.at_level(logging.WARNING):
        request = serve(later)
    assert bits(request) == expected
    assert later.cache.disk is not None
    assert later.cache.disk.problems > 0
    assert "cache_file_problem" in caplog.text
    again = engine(net, disk=stored)  # what was computed again was stored again
    assert serve(again).cached_tokens == LENGTH
    assert again.cache.disk is not None
    assert again.cache.disk.problems == 0


def test_every_byte_of_a_record_counts(net: Transformer, stored: Path) -> None:
    cache = engine(net, disk=stored).cache.disk
    assert cache is not None
    path = files(stored, "state")[0]
    kind, key, _, _ = disk_cache._parse(path.name)  # type: ignore[misc]
    whole = path.read_bytes()
    for at in [*range(80), *range(80, len(whole), 997), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1
        assert cache._unpack(kind, key, bytes(changed)) is None
    assert cache._unpack(kind, key, whole) is not None


def test_another_models_cache_is_not_seen(net: Transformer, device: str, stored: Path) -> None:
    other = model(seed=2, device=device)
    later = engine(other, disk=stored)
    assert serve(later).cached_tokens == 0
    assert len(list(stored.iterdir())) == 3  # a marker and two models
    assert serve(engine(net, disk=stored)).cached_tokens == LENGTH
    keys = engine(net, disk=stored, indexer="fp8")
    assert serve(keys).cached_tokens == 0


class TestFolders:
    def test_a_folder_with_other_things_in_it(self, net: Transformer, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        (tmp_path / ".tmp-1").write_text("")  # of a process that died as it made the folder
        with pytest.raises(CacheError, match="other files"):
            engine(net, disk=tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "mine"
        (tmp_path / "thesis.txt").unlink()
        engine(net, disk=tmp_path)

    def test_another_version(self, net: Transformer, tmp_path: Path) -> None:
        (tmp_path / disk_cache.MARKER).write_text('{"format": "fathomK9"}')
        with pytest.raises(CacheError, match="another version"):
            engine(net, disk=tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "no json"])
    def test_a_damaged_marker(self, net: Transformer, tmp_path: Path, content: str) -> None:
        (tmp_path / disk_cache.MARKER).write_text(content)
        with pytest.raises(CacheError, match="damaged"):
            engine(net, disk=tmp_path)

    def test_a_folder_that_cannot_be_written(self, net: Transformer, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("in the way")
        with pytest.raises(CacheError, match="cannot be used"):
            engine(net, disk=blocked / "cache")
        with pytest.raises(CacheError, match="cannot be used"):
            engine(net, wal=blocked / "log")

    def test_a_full_disk(
        self,
        net: Transformer,
        tmp_path: Path,
        expected: list[Drawn],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        served = engine(net, disk=tmp_path)

        def full(self: Path, target: Path) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr(Path, "replace", full)
            assert bits(serve(served)) == expected  # the request does not suffer
            with pytest.raises(CacheError, match="No space left"):
                served.save_session(prompt(LENGTH))
        assert served.cache.disk is not None
        assert served.cache.disk.problems > 0
        assert not list(tmp_path.glob("*/.tmp-*"))
        assert not files(tmp_path, "slab")
        again = serve(served)
        assert bits(again) == expected
        assert files(tmp_path, "slab")

    def test_leftovers_of_a_process_that_died(self, net: Transformer, stored: Path) -> None:
        torn = next(stored.glob("*/")) / ".tmp-1-ab"
        own = next(p for p in stored.iterdir() if p.is_dir())
        torn = own / ".tmp-1-ab"
        torn.write_bytes(b"half a record")
        assert serve(engine(net, disk=stored)).cached_tokens == LENGTH
        assert not torn.exists()


class TestLimits:
    def test_what_was_used_longest_ago_goes_first(self, net: Transformer, tmp_path: Path) -> None:
        served = engine(net, disk=tmp_path)
        size = served.memory.slabs.layout.slab_bytes
        root = served.cache.root
        small = disk_cache.DiskCache(tmp_path, root, 3 * (size + 200))
        names = [bytes([i]) * 16 for i in range(5)]
        for name in names[:3]:
            small.write("slab", name, bytes(size))
        assert small.read("slab", names[0]) is not None
        small.write("slab", names[3], bytes(size))
        assert [small.has("slab", n) for n in names[:4]] == [True, False, True, True]
        small.pin("slab", names[2])
        small.write("slab", names[4], bytes(size))
        small.write("slab", names[1], bytes(size))
        assert small.has("slab", names[2])
        assert small.size <= small.limit
        assert small.size == sum(p.stat().st_size for p in files(tmp_path, "slab"))
        again = disk_cache.DiskCache(tmp_path, root, 3 * (size + 200))
        assert again.size == small.size
        for name in names:
            again.pin("slab", name)
        with pytest.raises(CacheError, match="leaves no room"):
            again.write("slab", b"z" * 16, bytes(3 * size))

    def test_host_memory_is_bounded(self, net: Transformer, expected: list[Drawn]) -> None:
        served = engine(net)
        size = served.memory.slabs.layout.slab_bytes
        served = engine(net, cache_tokens=1024, host_bytes=2 * size, checkpoint_bytes=60_000)
        for seed in range(6):
            finish(served, served.submit(prompt(600, seed), greedy(2)))
        tiers = served.cache.occupancy()
        assert served.cache._host.size <= 2 * size
        assert served.cache.checkpoints.memory.size <= 60_000 + 40_000
        assert tiers["device"][0] <= 1024
        assert bits(serve(served)) == expected


class TestSessions:
    def test_saved_killed_and_loaded(
        self, net: Transformer, tmp_path: Path, expected: list[Drawn]
    ) -> None:
        first = engine(net, disk=tmp_path)
        request = first.submit(prompt(LENGTH), sampled(8))
        while len(request.output) < 4:
            first.step()
        name = first.save_session(request)
        del first, request
        later = engine(net, disk=tmp_path)
        tokens = later.load_session(name)
        assert tokens[:LENGTH] == prompt(LENGTH)
        assert tokens[LENGTH:] == [d.token for d in expected[:3]]
        rest = later.submit([*tokens, expected[3].token], greedy(1))
        finish(later, rest)
        assert rest.cached_tokens == len(tokens)

    def test_sessions_are_pinned(self, net: Transformer, tmp_path: Path) -> None:
        served = engine(net, disk=tmp_path)
        serve(served)
        served.save_session(prompt(LENGTH))
        pinned = [p.name for p in tmp_path.glob("*/*.pin")]
        assert sorted(name.split("-")[0] for name in pinned) == ["session", "slab", "slab", "state"]

    def test_refusals(self, net: Transformer, stored: Path) -> None:
        with pytest.raises(CacheError, match="no disk cache"):
            engine(net).save_session([5])
        with pytest.raises(CacheError, match="no disk cache"):
            engine(net).load_session(b"0" * 16)
        served = engine(net, disk=stored)
        with pytest.raises(CacheError, match="nothing of this sequence"):
            served.save_session(prompt(300, seed=5))
        with pytest.raises(CacheError, match="no session"):
            served.load_session(b"0" * 16)


def test_records_of_checkpoints_are_checked() -> None:
    checkpoint = Checkpoint(position=258, tail=(5, 6), state=b"abc", entries=b"de", hidden=b"fghi")
    record = encode_checkpoint(b"p" * 16, checkpoint)
    assert decode_checkpoint(record) == (b"p" * 16, checkpoint)
    for bad in (b"", record[:-1], record + b"x", record[:40], os.urandom(100)):
        assert decode_checkpoint(bad) is None


def test_a_checkpoint_of_another_shape_is_refused(
    net: Transformer, expected: list[Drawn], caplog: pytest.LogCaptureFixture
) -> None:
    served = engine(net)
    serve(served)
    memory = served.cache.checkpoints.memory
    for key in memory.keys():
        parent, checkpoint = memory.get(key)  # type: ignore[misc]
        short = Checkpoint(
            position=checkpoint.position,
            tail=checkpoint.tail,
            state=checkpoint.state[:-1],
            entries=checkpoint.entries,
            hidden=checkpoint.hidden,
        )
        memory.put(key, (parent, short), short.size)
    assert bits(serve(served)) == expected
    assert "checkpoint_refused" in caplog.text

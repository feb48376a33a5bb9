"""The log store: what was durable comes back, what is damaged is never guessed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.sandbox.trajectory import index
from fathom.sandbox.trajectory.errors import (
    LogCorrupt,
    LogFull,
    LogLocked,
    LogTooNew,
    TrajectoryError,
)
from fathom.sandbox.trajectory.log import Log, Reader, is_locked
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.segment import SEGMENT_HEADER, SMALLEST_SEGMENT

SMALL = SMALLEST_SEGMENT


def fill(folder: Path, count: int, *, size: int = SMALL, sandbox: str = "sb") -> None:
    with Log(folder, segment_size=size, durability="process") as log:
        for number in range(count):
            log.append(
                Kind.VALUE,
                sandbox,
                key=f"k{number}",
                fields={"n": number},
                blobs={"out": bytes([number % 256]) * (number % 50)},
            )


def numbers(log: Reader, sandbox: str = "sb") -> list[int]:
    return [log.body(record).fields["n"] for record in log.records(sandbox)]


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def forget_index(folder: Path) -> None:
    for path in folder.glob("index.sqlite*"):
        path.unlink()


def ends_of_records(data: bytes) -> list[int]:
    """Where each record ends, read by the documented layout alone."""
    ends, at = [], SEGMENT_HEADER
    while at + 12 <= len(data) and data[at : at + 3] == b"FTR":
        at += (struct.unpack_from("<I", data, at + 8)[0] + 7) // 8 * 8
        ends.append(at)
    return ends


def test_what_was_written_is_read_back(tmp_path):
    with Log(tmp_path, segment_size=SMALL) as log:
        first = log.append(Kind.CREATE, "a", epoch=7, fields={"image": "base"})
        log.append(Kind.INTENT, "b", key="k", digest=b"d" * 32, fields={"x": [1, "\u00e9"]})
        third = log.append(
            Kind.RECEIPT,
            "a",
            parent=first.node_sequence,
            blobs={"small": b"\0\xff", "large": bytes(range(256)) * 100},
        )
    with Reader(tmp_path) as log:
        assert [s.sandbox for s in log.sandboxes()] == ["b", "a"]
        records = list(log.records("a"))
        assert [r.kind for r in records] == [Kind.CREATE, Kind.RECEIPT]
        assert [r.sequence for r in records] == [1, 2]
        assert [r.node_sequence for r in records] == [1, 3]
        assert records == [first, third]
        assert records[1].parent == 1
        assert records[1].epoch == 7
        body = log.body(records[1])
        assert log.blob(body.blobs["small"]) == b"\0\xff"
        assert body.blobs["large"].inline is None
        assert log.blob(body.blobs["large"]) == bytes(range(256)) * 100
        assert log.body(next(iter(log.records("b")))).fields == {"x": [1, "\u00e9"]}


def test_a_log_goes_on_where_it_ended(tmp_path):
    for start in range(3):
        with Log(tmp_path, segment_size=SMALL) as log:
            assert log.last == start
            log.append(Kind.VALUE, "sb", fields={"n": start})
    with Reader(tmp_path) as log:
        assert numbers(log) == [0, 1, 2]


def test_segments_follow_each_other(tmp_path):
    fill(tmp_path, 1000)
    assert len(segment_files(tmp_path)) > 3
    assert {path.stat().st_size for path in segment_files(tmp_path)} == {SMALL}
    with Reader(tmp_path) as log:
        assert numbers(log) == list(range(1000))
    fill(tmp_path, 5)
    with Log(tmp_path, segment_size=SMALL) as log:
        assert numbers(log) == [*range(1000), *range(5)]


def test_the_index_may_be_deleted_or_damaged(tmp_path):
    fill(tmp_path, 1000)
    for damage in (None, b"", b"garbage" * 1000):
        forget_index(tmp_path)
        if damage is not None:
            (tmp_path / "index.sqlite").write_bytes(damage)
        with Log(tmp_path, segment_size=SMALL) as log:
            assert numbers(log) == list(range(1000))


def test_an_index_of_another_log_is_not_believed(tmp_path):
    fill(tmp_path / "a", 600)
    fill(tmp_path / "b", 3)
    shutil.copy(tmp_path / "a" / "index.sqlite", tmp_path / "b" / "index.sqlite")
    with Log(tmp_path / "b", segment_size=SMALL) as log:
        assert numbers(log) == [0, 1, 2]


@pytest.fixture(scope="module")
def small_log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "log"
    fill(folder, 3)
    return folder


def test_cut_at_every_byte(small_log, tmp_path):
    """Whatever is missing at the end, the records before it are whole and the log goes on."""
    file = segment_files(small_log)[0]
    data = file.read_bytes()
    ends = ends_of_records(data)
    assert len(ends) == 3
    folder = tmp_path / "log"
    folder.mkdir()
    for size in range(ends[-1] + 9):
        (folder / file.name).write_bytes(data[:size])
        forget_index(folder)
        if size <= SEGMENT_HEADER:
            with pytest.raises(LogCorrupt):
                Log(folder, segment_size=SMALL)
            continue
        whole = sum(end <= size for end in ends)
        with Reader(folder) as log:
            assert numbers(log) == list(range(whole))
        if size % 5 and not any(abs(size - end) < 3 for end in ends):
            continue  # writing is slow and does the same between these places
        with Log(folder, segment_size=SMALL, durability="process") as log:
            log.append(Kind.VALUE, "sb", fields={"n": 99})
        with Reader(folder) as log:
            assert numbers(log) == [*range(whole), 99]
        assert (folder / file.name).stat().st_size == SMALL


def test_a_changed_byte_anywhere(small_log, tmp_path):
    """Damage to what had been durable stops the log; damage to the last record is a torn write."""
    file = segment_files(small_log)[0]
    data = bytearray(file.read_bytes())
    ends = ends_of_records(bytes(data))
    folder = tmp_path / "log"
    folder.mkdir()
    for at in range(ends[-1] + 40):
        data[at] ^= 0x41
        (folder / file.name).write_bytes(data)
        data[at] ^= 0x41
        forget_index(folder)
        before = (folder / file.name).read_bytes()
        if at < ends[-2]:
            with pytest.raises(LogCorrupt):
                Reader(folder)
            if at % 5 == 0:
                with pytest.raises(LogCorrupt):
                    Log(folder, segment_size=SMALL)
            assert (folder / file.name).read_bytes() == before, "a damaged log was changed"
        else:
            expected = 2 if at < ends[-1] else 3
            # The padding of the last record and the free space hold no information.
            with Reader(folder) as log:
                assert numbers(log) == list(range(expected))
            if at % 5 == 0:
                with Log(folder, segment_size=SMALL, durability="process") as log:
                    assert numbers(log) == list(range(expected))


@settings(max_examples=40)
@given(at=st.floats(0, 1, exclude_max=True), junk=st.binary(min_size=1, max_size=64))
@pytest.mark.parametrize("indexed", [True, False])
def test_junk_written_over_a_log_of_several_segments(tmp_path_factory, at, junk, indexed):
    """Either every record comes back, or the last ones are missing, or the log is refused."""
    folder = _several_segments(tmp_path_factory)
    copy = tmp_path_factory.mktemp("junk") / "log"
    shutil.copytree(folder, copy)
    files = segment_files(copy)
    place = int(at * SMALL * len(files))
    file, offset = files[place // SMALL], place % SMALL
    old = file.read_bytes()
    new = (old[:offset] + junk + old[offset + len(junk) :])[:SMALL]
    file.write_bytes(new)
    if not indexed:
        forget_index(copy)
    try:
        with Log(copy, segment_size=SMALL, durability="process") as log:
            found = numbers(log)
    except (LogCorrupt, LogTooNew):
        assert new != old
    else:
        assert found == list(range(500))[: len(found)]
        if len(found) < 500:
            assert not indexed, "the index is a witness of the last record as well"
            assert file == files[-1]
            assert len(found) == 499, "only the last record may be taken for a torn write"
    shutil.rmtree(copy)


_MADE: list[Path] = []


def _several_segments(factory) -> Path:
    if not _MADE:
        _MADE.append(factory.mktemp("several") / "log")
        fill(_MADE[0], 500)
        assert len(segment_files(_MADE[0])) >= 2
    return _MADE[0]


def test_a_missing_segment_is_noticed(tmp_path):
    fill(tmp_path, 1500)
    files = segment_files(tmp_path)
    for victim in (files[0], files[1]):
        kept = victim.rename(tmp_path / "kept")
        with pytest.raises(LogCorrupt):
            Log(tmp_path, segment_size=SMALL)
        with pytest.raises(LogCorrupt):
            Reader(tmp_path)
        kept.rename(victim)
    Log(tmp_path, segment_size=SMALL).close()


@pytest.mark.parametrize("durability", ["power", "process"])
def test_the_index_is_a_witness_of_what_was_last(tmp_path, durability):
    folder = tmp_path / "log"
    with Log(folder, segment_size=SMALL, durability=durability) as log:
        for number in range(1200):
            log.append(Kind.VALUE, "sb", fields={"n": number}, durable=number % 300 == 0)
    last = segment_files(folder)[-1]
    whole = last.read_bytes()
    ends = ends_of_records(whole)
    flipped = bytearray(whole)
    flipped[ends[-1] - 9] ^= 1  # in the very last record, which looks like a torn one
    losses = {
        "removed": None,
        "zeroed": whole[:SEGMENT_HEADER] + bytes(len(whole) - SEGMENT_HEADER),
        "cut": whole[: SEGMENT_HEADER + 1],
        "one record less": whole[: ends[-2]] + bytes(len(whole) - ends[-2]),
        "flipped": bytes(flipped),
    }
    for what, data in losses.items():
        last.unlink()
        if data is not None:
            last.write_bytes(data)
        for _ in range(2):  # a look at it changes nothing
            with pytest.raises(LogCorrupt, match="to 1200 of"):
                Log(folder, segment_size=SMALL, durability=durability)
            with pytest.raises(LogCorrupt, match="to 1200 of"):
                Reader(folder)
        assert last.exists() == (data is not None), what
        if data is not None:
            assert last.read_bytes() == data, what
        last.write_bytes(whole)
        with Log(folder, segment_size=SMALL, durability=durability) as log:
            assert numbers(log) == list(range(1200))
    # Nor is a log begun in the place of one that is gone.
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in segment_files(folder):
        path.rename(kept / path.name)
    with pytest.raises(LogCorrupt, match="records 1 to 1200 of"):
        Log(folder, segment_size=SMALL, durability=durability)
    with pytest.raises(LogCorrupt, match="records 1 to 1200 of"):
        Reader(folder)
    for path in kept.iterdir():
        path.rename(folder / path.name)
    # Whoever wants to go on without them says so.
    last.unlink()
    forget_index(folder)
    with Log(folder, segment_size=SMALL, durability=durability) as log:
        assert numbers(log) == list(range(len(numbers(log))))
        log.append(Kind.VALUE, "sb", fields={"n": -1})
    with Reader(folder) as log:
        assert numbers(log)[-1] == -1


def test_a_torn_write_beyond_what_was_durable_is_still_one(tmp_path):
    """A witness that was written before the last records says nothing of them."""
    log = Log(tmp_path / "log", segment_size=SMALL)
    for number in range(10):
        log.append(Kind.VALUE, "sb", fields={"n": number})
    log.places("sb")  # writes the index out
    log.append(Kind.VALUE, "sb", fields={"n": 10}, durable=False)
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    log.close()
    file = segment_files(tmp_path / "copy")[0]
    data = bytearray(file.read_bytes())
    data[ends_of_records(bytes(data))[-1] - 9] ^= 1
    file.write_bytes(data)
    with Log(tmp_path / "copy", segment_size=SMALL) as log:
        assert numbers(log) == list(range(10))
    assert file.stat().st_size == SMALL
    assert not any(file.read_bytes()[ends_of_records(file.read_bytes())[-1] :])


def test_what_only_the_kernel_kept_is_not_expected_after_it_ended(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    fill(tmp_path, 600)
    segment_files(tmp_path)[-1].unlink()
    with pytest.raises(LogCorrupt):
        Reader(tmp_path)
    monkeypatch.setattr(index, "_boot", lambda: "another")
    with Log(tmp_path, segment_size=SMALL, durability="process") as log:
        assert 0 < len(numbers(log)) < 600


def test_segments_of_two_logs_do_not_mix(tmp_path):
    fill(tmp_path / "a", 1000)
    fill(tmp_path / "b", 1000)
    theirs = segment_files(tmp_path / "b")[1]
    shutil.copy(theirs, tmp_path / "a" / theirs.name)
    with pytest.raises(LogCorrupt, match="another log"):
        Log(tmp_path / "a", segment_size=SMALL)


def test_a_forged_record_in_a_body_is_not_a_witness(tmp_path):
    """A tenant's output that looks like a record cannot turn a torn write into corruption."""
    fill(tmp_path / "other", 3)
    forged = segment_files(tmp_path / "other")[0].read_bytes()
    forged = forged[SEGMENT_HEADER : ends_of_records(forged)[-1]]
    folder = tmp_path / "log"
    with Log(folder, segment_size=SMALL) as log:
        for shift in range(8):
            log.append(Kind.VALUE, "sb", fields={"n": shift})
        for shift in range(8):
            log.append(Kind.VALUE, "sb", blobs={"out": bytes(shift) + forged})
            break
    file = segment_files(folder)[0]
    data = bytearray(file.read_bytes())
    data[ends_of_records(bytes(data))[-2] + 20] ^= 1
    file.write_bytes(data)
    forget_index(folder)  # a better witness than any record
    with Log(folder, segment_size=SMALL) as log:
        assert log.last == 8


def test_a_damaged_record_is_found_when_it_is_read(tmp_path):
    """Rot behind the back of an open log, which no time stamp tells."""
    fill(tmp_path, 1000)
    with Log(tmp_path, segment_size=SMALL) as log:
        place = log.places("sb")[10]
        with segment_files(tmp_path)[0].open("r+b") as file:
            file.seek(place.offset + 150)
            file.write(b"\xff\xff")
        with pytest.raises(LogCorrupt):
            log.read(place)


def test_damaged_or_missing_payloads_are_noticed(tmp_path):
    with Log(tmp_path, segment_size=SMALL) as log:
        record = log.append(Kind.VALUE, "sb", blobs={"out": b"x" * 5000})
        blob = log.body(record).blobs["out"]
        (path,) = [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
        path.write_bytes(b"y" * 5000)
        with pytest.raises(LogCorrupt):
            log.blob(blob)
        path.unlink()
        with pytest.raises(LogCorrupt):
            log.blob(blob)


def test_a_log_of_a_later_version_is_refused(tmp_path):
    import zlib

    fill(tmp_path, 2)
    file = segment_files(tmp_path)[0]
    data = bytearray(file.read_bytes())
    struct.pack_into("<I", data, 8, 2)
    struct.pack_into("<I", data, 12, zlib.crc32(data[:12]))
    data[16:64] = os.urandom(48)  # a later version may put there what it likes
    file.write_bytes(data)
    for kind in (Log, Reader):
        with pytest.raises(LogTooNew, match="format 2"):
            kind(tmp_path)
    assert file.read_bytes() == data


def test_one_writer_at_a_time(tmp_path):
    with Log(tmp_path, segment_size=SMALL) as log:
        log.append(Kind.VALUE, "sb", fields={"n": 0})
        assert is_locked(tmp_path)
        with pytest.raises(LogLocked):
            Log(tmp_path, segment_size=SMALL)
        with Reader(tmp_path) as other:
            assert numbers(other) == [0]
    assert not is_locked(tmp_path)
    with pytest.raises(TrajectoryError, match="closed"):
        log.append(Kind.VALUE, "sb")


def test_many_threads_write_one_order(tmp_path):
    with Log(tmp_path, segment_size=SMALL) as log:

        def work(name: str) -> None:
            for number in range(25):
                log.append(Kind.VALUE, name, fields={"n": number})

        threads = [threading.Thread(target=work, args=(f"sb-{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.last == 200
    with Reader(tmp_path) as log:
        for i in range(8):
            assert numbers(log, f"sb-{i}") == list(range(25))


def test_no_log_is_said(tmp_path):
    with pytest.raises(TrajectoryError, match="no log"):
        Reader(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_unusable_names_write_nothing(tmp_path, name):
    with Log(tmp_path, segment_size=SMALL) as log:
        with pytest.raises(TrajectoryError):
            log.append(Kind.VALUE, name)
        with pytest.raises(TrajectoryError):
            log.append(Kind.VALUE, "sb", key="k" * 256)
        log.append(Kind.VALUE, "sb", fields={"n": 1})
        assert log.last == 1


@pytest.fixture
def tiny_disk(tmp_path, need_root):
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _use_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def _append_until_full(log: Log) -> None:
    for _ in range(10_000):
        log.append(Kind.VALUE, "sb", fields={"n": 0}, blobs={"out": b"x" * 1000})


def test_a_full_disk_refuses_what_begins_and_keeps_what_ends(tiny_disk):
    with Log(tiny_disk / "log", segment_size=SMALL) as log:
        intents = [log.append(Kind.INTENT, "sb", key="kept", reserve=True)]
        with pytest.raises(OSError, match="No space"):
            _use_up(tiny_disk / "filler")
        with pytest.raises(LogFull):
            _append_until_full(log)
        before = log.last
        assert before > 20
        with pytest.raises(LogFull):
            log.append(Kind.INTENT, "sb", key="refused", blobs={"request": b"x" * 9000})
        assert log.last == before
        receipt = log.append(
            Kind.RECEIPT,
            "sb",
            parent=intents[0].node_sequence,
            fields={"exit": 0},
            blobs={"stdout": b"y" * 9000, "stderr": b"small"},
        )
        body = log.body(receipt)
        assert body.blobs["stdout"].lost
        assert log.blob(body.blobs["stdout"]) is None
        assert log.blob(body.blobs["stderr"]) == b"small"
        assert not list((tiny_disk / "log").rglob("*.new"))
        (tiny_disk / "filler").unlink()
        log.append(Kind.INTENT, "sb", key="now")
    with Reader(tiny_disk / "log") as log:
        assert log.last == before + 2


def test_a_log_on_a_full_disk_opens_and_takes_the_receipts_it_kept_room_for(tiny_disk):
    with Log(tiny_disk / "log", segment_size=SMALL) as log:
        for number in range(40):
            log.append(Kind.VALUE, "sb", fields={"n": number}, blobs={"out": b"x" * 3000})
        intent = log.append(Kind.INTENT, "sb", key="kept", fields={"n": 40}, reserve=True)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            _use_up(tiny_disk / "filler")
        with Log(tiny_disk / "log", segment_size=SMALL) as log:
            assert numbers(log)[:41] == list(range(41))
            log.keep(intent.node_sequence)
            fields = {"n": 41}
            log.append(Kind.RECEIPT, "sb", parent=intent.node_sequence, fields=fields)
    (tiny_disk / "filler").unlink()
    with Reader(tiny_disk / "log") as log:
        assert numbers(log) == [*range(41), 41, 41]


def test_a_full_disk_makes_no_half_log(tiny_disk):
    with pytest.raises(LogFull):
        Log(tiny_disk / "log", segment_size=1 << 20)
    assert [p.name for p in (tiny_disk / "log").iterdir()] == ["lock"]
    Log(tiny_disk / "log", segment_size=SMALL).close()


KILLED = """
import sys
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.record import Kind
with Log(sys.argv[1], segment_size=1 << 16, durability="process") as log:
    for number in range(100_000):
        log.append(Kind.VALUE, "sb", fields={"n": number}, blobs={"out": b"x" * (number % 6000)})
        print(number, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path):
    for round_ in range(3):
        folder = tmp_path / str(round_)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(40 + 60 * round_)]
        process.kill()
        reported = [int(line) for line in [*lines, *process.stdout.read().split("\n")] if line]
        process.wait()
        process.stdout.close()
        with Log(folder, segment_size=SMALL) as log:
            found = numbers(log)
            assert found == list(range(len(found)))
            assert len(found) - len(reported) in (0, 1)
            for record in log.records("sb"):
                body = log.body(record)
                assert len(log.blob(body.blobs["out"]) or b"") == body.fields["n"] % 6000


def test_a_reader_beside_a_busy_writer_sees_whole_records(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        seen = 0
        for _ in range(15):
            with Reader(tmp_path / "log") as log:
                found = numbers(log)
            assert found == list(range(len(found)))
            assert len(found) >= seen
            seen = len(found)
            for _ in range(5):
                process.stdout.readline()
        assert seen > 50
    finally:
        process.kill()
        process.communicate()

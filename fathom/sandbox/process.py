"""A command that runs in a sandbox: its input and output as they come, and how it ended.

Paper: §5.2.5 (command execution and terminals of the common surface).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal as signals
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import anyio

from fathom.errors import ProcessClosed, SandboxError, SandboxLost
from fathom.sandbox import frames
from fathom.sandbox.frames import Flags, Frame, Received, Tag
from fathom.sandbox.line import Line, refusal
from fathom.sandbox.request import FIXED_ENVIRONMENT, Request

_log = logging.getLogger(__name__)
StreamName = Literal["stdout", "stderr"]
NUMBER = 1
# Bytes of output that a writer takes in for a reader that is slow.
_MOST_HELD = 64 << 20
NO_FLAGS = Flags(0)
NAMES: dict[int, StreamName] = {Frame.STDOUT: "stdout", Frame.STDERR: "stderr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended, as the agent tells it. Totals count what was written, kept or not.

    `lost`: of a replay, bytes of output that were kept as it ran and that the receipt has not.
    """

    exit_code: int
    timed_out: bool
    cancelled: bool
    killed_all: bool
    oom_killed: bool
    replayed: bool
    duration: float
    cpu: float
    peak_memory: int
    stdout_total: int
    stderr_total: int
    lost: int = 0
    problem: str = ""


def read_end(frame: Received) -> Ended:
    """Read an EXIT frame."""
    fields = frame.fields()

    def number(tag: Tag) -> int:
        return frames.number_of(fields.get(tag))

    return Ended(
        exit_code=number(Tag.EXIT),
        timed_out=bool(number(Tag.TIMED_OUT)),
        cancelled=bool(number(Tag.CANCELLED)),
        killed_all=bool(number(Tag.KILLED_ALL)),
        oom_killed=bool(number(Tag.OOM_KILLED)),
        replayed=bool(number(Tag.REPLAYED)),
        duration=number(Tag.DURATION_US) / 1e6,
        cpu=(number(Tag.USER_US) + number(Tag.SYSTEM_US)) / 1e6,
        peak_memory=number(Tag.MAX_RSS_KB) << 10,
        stdout_total=number(Tag.STDOUT_TOTAL),
        stderr_total=number(Tag.STDERR_TOTAL),
        lost=number(Tag.LOST),
        problem=frames.text_of(fields.get(Tag.PROBLEM)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request with everything that the agent is told besides."""

    request: Request
    cap: int
    flags: Flags = NO_FLAGS
    op: str | None = None
    digest: str = ""
    rows: int = 0
    columns: int = 0
    env: dict[str, str] = field(default_factory=dict[str, str])

    def frame(self) -> bytes:
        """Return the EXEC frame. Raises SandboxError where the request is too large."""
        request = self.request
        flags = self.flags | (Flags.SHELL if request.shell else Flags(0))
        fields: list[tuple[int, bytes | str | int]] = [(Tag.ARG, text) for text in request.argv]
        if request.builtin:
            fields += [(Tag.BUILTIN, request.builtin), (Tag.WRITE_MODE, request.mode)]
        else:
            variables = {**FIXED_ENVIRONMENT, **self.env, **request.env}
            fields += [(Tag.ENV, f"{name}={value}") for name, value in variables.items()]
        fields += [
            (Tag.CWD, request.cwd),
            (Tag.TIMEOUT_US, max(1, int(request.timeout * 1e6))),
            (Tag.CAP, self.cap),
            (Tag.FLAGS, int(flags)),
        ]
        if self.op is not None:
            fields += [(Tag.OP, self.op), (Tag.DIGEST, self.digest)]
        if self.flags & Flags.PTY:
            fields += [(Tag.ROWS, self.rows), (Tag.COLS, self.columns)]
        payload = frames.join_fields(fields)
        if len(payload) > frames.FRAME_LIMIT:
            raise SandboxError(
                f"the command with its variables has {len(payload)} bytes: write what is large to "
                "a file with files.write"
            )
        return frames.pack(NUMBER, Frame.EXEC, payload)


class Feeder:
    """Standard input that is known beforehand, sent as fast as the agent grants."""

    def __init__(self, data: bytes) -> None:
        self._left: memoryview | None = memoryview(data)
        self._sent = 0
        self._granted = frames.WINDOW

    def next(self, taken: int = 0) -> bytes:
        """Return the frames that may be sent once the agent has taken so many bytes."""
        self._granted = max(self._granted, taken + frames.WINDOW)
        if self._left is None:
            return b""
        parts: list[bytes] = []
        while self._left and self._sent < self._granted:
            piece = bytes(self._left[: min(frames.PIECE, self._granted - self._sent)])
            self._left = self._left[len(piece) :]
            self._sent += len(piece)
            parts.append(frames.pack(NUMBER, Frame.STDIN, piece))
        if not self._left:
            parts.append(frames.pack(NUMBER, Frame.EOF))
            self._left = None
        return b"".join(parts)


class Kept:
    """One stream's output: the first bytes, and where asked all of it in a file by its digest.

    `problem` says why the file could not be written: what the command did is not lost for that.
    """

    def __init__(self, cap: int, spill: int, folder: Path) -> None:
        self.data = bytearray()
        self._cap = cap
        self._spill = spill
        self._folder = folder
        self._file = -1
        self._path = folder / f".{os.getpid()}-{id(self):x}"
        self._digest = hashlib.sha256()
        self._size = 0
        self.problem = ""

    def add(self, piece: bytes) -> None:
        """Take the next bytes."""
        room = self._cap - len(self.data)
        try:
            wanted = self._spill > self._cap and not self.problem
            if wanted and len(piece) > room and self._file < 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
                self._store(bytes(self.data))
            if self._file >= 0:
                self._store(piece[: self._spill - self._size])
        except OSError as error:
            self._give_up(error)
        self.data += piece[:room]

    def _give_up(self, error: OSError) -> None:
        self.close()
        self.problem = f"output cannot be stored in {self._folder}: {error.strerror}"
        _log.warning("event=output_not_stored folder=%s error=%r", self._folder, error.strerror)

    def _store(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._size += len(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(self._file, view) :]

    def finish(self) -> tuple[str, int] | None:
        """Return digest and size of what was stored, None where nothing had to be."""
        if self._file < 0:
            return None
        name = self._digest.hexdigest()
        try:
            os.fsync(self._file)
            self._path.rename(self._folder / name)
        except OSError as error:
            self._give_up(error)
            return None
        self.close(keep=True)
        return name, self._size

    def close(self, *, keep: bool = False) -> None:
        """Let go of the file, and of what it holds unless it is kept."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if not keep:
                self._path.unlink(missing_ok=True)


class Process:
    """A command that runs. `async with` ends it; `async for` gives its output as it comes.

    Output is a pair of the stream's name and bytes; a terminal has one stream, "stdout". Any number
    of tasks may read, write and close it at the same time: one of them receives for all.
    """

    def __init__(self, line: Line, name: str) -> None:
        self._line = line
        self._name = name
        self._taken = 0
        self._sent = 0
        self._output: deque[Received] = deque()
        self._held = 0
        self._was_read = False
        self._receiving = False
        self._news = anyio.Event()
        self._ended: Ended | None = None
        self._closed = False
        self.pid: int | None = None

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        while (piece := await self.read()) is not None:
            yield piece

    async def read(self) -> tuple[StreamName, bytes] | None:
        """Return the next output, None once the command has ended.

        Raises SandboxLost, ProcessClosed.
        """
        self._was_read = True
        while True:
            if self._closed:
                raise ProcessClosed(f"this command in sandbox {self._name} was closed")
            if self._output:
                frame = self._output.popleft()
                self._held -= len(frame.payload)
                if self._held + len(frame.payload) > _MOST_HELD >= self._held:
                    self._tell()  # whoever writes may hear more
                return NAMES[frame.kind], frame.payload
            if self._ended is not None:
                return None
            await self._hear()

    async def _hear(self) -> None:
        """Take in what comes next; while another task does, wait until it has.

        Raises SandboxLost, ProcessClosed, Refused.
        """
        if self._receiving:
            return await self._news.wait()
        self._receiving = True
        try:
            found = await self._line.receive()
            if not found:
                raise SandboxLost(f"sandbox {self._name} was lost while a command ran")
            for frame in found:
                self._note(frame)
        finally:
            self._receiving = False
            self._tell()
        return None

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    def _note(self, frame: Received) -> None:
        if frame.kind in NAMES:
            self._output.append(frame)
            self._held += len(frame.payload)
        elif frame.kind == Frame.ERROR:
            problem = refusal(frame)
            if problem.reason != "failed":  # a signal that came too late is no failure
                raise problem
        elif frame.kind == Frame.STARTED:
            self.pid = frames.number_of(frame.fields().get(Tag.PID))
        elif frame.kind == Frame.CREDIT:
            self._taken = frames.number_of(frame.fields().get(Tag.CAP))
        elif frame.kind == Frame.EXIT:
            self._ended = read_end(frame)

    async def write(self, data: bytes | str) -> None:
        """Send standard input, waiting while the command does not read it.

        Output that comes meanwhile is kept for `read`; beyond 64 MiB this waits for it to be read.
        Raises SandboxLost, ProcessClosed, and SandboxError where nobody ever reads the output.
        Input for a command that has ended is dropped.
        """
        left = memoryview(data.encode() if isinstance(data, str) else data)
        while left and self._ended is None:
            room = self._taken + frames.WINDOW - self._sent
            if room <= 0:
                await self._hear_for_input()
                continue
            piece = bytes(left[: min(room, frames.PIECE)])
            # Counted first: it counts as sent from the moment at which the line has it.
            self._sent += len(piece)
            left = left[len(piece) :]
            await self._line.send(frames.pack(NUMBER, Frame.STDIN, piece))

    async def _hear_for_input(self) -> None:
        if self._held <= _MOST_HELD:
            await self._hear()
        elif self._was_read:
            await self._news.wait()
        else:
            raise SandboxError(
                f"the command wrote {self._held} bytes that nobody reads: read while you write"
            )

    async def close_input(self) -> None:
        """Say that no more input comes (on a terminal: by its key).

        Raises SandboxLost, ProcessClosed.
        """
        await self._line.send(frames.pack(NUMBER, Frame.EOF))

    async def signal(self, number: int = signals.SIGTERM) -> None:
        """Send a signal to the command and its process group.

        Raises SandboxLost, ProcessClosed, SandboxError.
        """
        if not 0 < number < 65:
            raise SandboxError(f"signal is {number}: give a number from 1 to 64")
        await self._line.send(
            frames.pack(NUMBER, Frame.SIGNAL, frames.join_fields([(Tag.SIGNAL, number)]))
        )

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of the command's terminal. Raises SandboxLost, ProcessClosed."""
        size = frames.join_fields([(Tag.ROWS, rows), (Tag.COLS, columns)])
        await self._line.send(frames.pack(NUMBER, Frame.RESIZE, size))

    async def wait(self) -> Ended:
        """Read on, dropping output, and return how the command ended.

        Raises SandboxLost, ProcessClosed, SandboxError where it did not run.
        """
        while await self.read() is not None:
            pass
        assert self._ended is not None
        if self._ended.problem:
            raise SandboxError(f"the command did not run: {self._ended.problem}")
        return self._ended

    async def close(self) -> None:
        """End the command where it still runs; tasks that wait for it get ProcessClosed.

        Does nothing the second time.
        """
        if not self._closed:
            self._closed = True
            self._line.close()
            self._tell()


def file_problem(problem: str) -> int | None:
    """Return the errno that a file operation reported, or None."""
    # Sent by a guest: of the numbers that there are, none has more digits.
    found = re.fullmatch(r"E([0-9]{1,5})", problem)
    return int(found[1]) if found else None

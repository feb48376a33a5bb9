"""Many lines over the one port of a virtual machine.

A sandbox's clients each open a line of their own, with numbers of their own. Here all of them are
carried over one virtio-serial port: every operation gets a number of the port, and what comes back
under it goes to the line that asked. Neither side is trusted: a client must say the session's
secret first, and whatever the guest sends that is no frame ends the machine.

A line whose client is slow makes the agent stop reading that command's output (HOLD), so that it
delays nobody else; a line that closes ends its commands (LEAVE), as on a Unix socket.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import frames
from fathom.sandbox.frames import Frame, Received, Tag
from fathom.sandbox.vm.greeting import greet

_CHUNK = 1 << 18
_STRANGER_LIMIT = 4096
_MOST_LINES, _MOST_STRANGERS = 512, 32
# Bytes that wait for a client: above the first its commands are held, above the last it is cut off.
_HIGH, _LOW, _TOO_MUCH = 512 << 10, 128 << 10, 32 << 20
_PORT_HIGH = 1 << 20
# Frames that nobody asked for: what a command had sent before it was told to end, and a reserve.
_STRAYS, _STRAYS_OF_ONE, _MOST_STRAYS = 100_000, 50_000, 1_000_000
_FROM_CLIENTS = {
    *(Frame.EXEC, Frame.STDIN, Frame.EOF, Frame.SIGNAL, Frame.RESIZE, Frame.CANCEL),
    *(Frame.QUERY, Frame.ACK, Frame.PING, Frame.SHIFT),
}
_ABOUT_A_COMMAND = {Frame.STDIN, Frame.EOF, Frame.SIGNAL, Frame.RESIZE, Frame.CANCEL}


@dataclass(eq=False, slots=True)
class _Line:
    """A client. `numbers`: its number of each open operation -> the port's."""

    sock: socket.socket
    known: bool = False
    held: bool = False
    splitter: frames.Splitter = field(default_factory=frames.Splitter)
    out: bytearray = field(default_factory=bytearray)
    taken: int = 0
    numbers: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(eq=False, slots=True)
class _Route:
    """Where the answers to one number of the port go; nowhere once its line is gone."""

    line: _Line | None
    number: int
    command: bool
    answer: Callable[[Received | None], None] | None = None


class Mux:
    """The lines of one machine, carried by a thread of its own from `start` on.

    `on_lost`: called once when they end for any reason but `close`: nobody reaches it then.
    """

    def __init__(
        self,
        listener: socket.socket,
        port: socket.socket,
        secret: bytes,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.secret = secret
        self._on_lost = on_lost
        self._listener = listener
        self._port = port
        self._greeting = b""
        self._lines: dict[_Line, None] = {}  # from the oldest to the newest
        self._routes: dict[int, _Route] = {}
        self._next = 1
        self._out = bytearray()
        self._splitter = frames.Splitter()
        self._lock = threading.RLock()
        self._quiet = False
        self._strays_left = _STRAYS
        self._closed = False
        self._lost = ""
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, daemon=True)

    # The beginning -----------------------------------------------------------------------------

    def greet(self, secret: bytes, timeout: float) -> None:
        """Begin the port's line, past whatever a former host left on it. Raises SandboxError."""
        answer, self._splitter = greet(self._port, secret, timeout)
        self._greeting = answer.payload
        self._port.setblocking(False)

    def start(self) -> None:
        """Carry lines from here on."""
        self._listener.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._port, selectors.EVENT_READ, "port")
        self._thread.start()

    # For the node ------------------------------------------------------------------------------

    def ask(self, kind: Frame, payload: bytes = b"", timeout: float = 30.0) -> Received:
        """Have the agent do one thing and return its answer. Raises SandboxError, SandboxLost."""
        found: list[Received | None] = []
        done = threading.Event()

        def answer(received: Received | None) -> None:
            found.append(received)
            done.set()

        with self._lock:
            if self._closed or self._lost:
                raise SandboxLost(self._lost or "the virtual machine was stopped")
            number = self._take_number(_Route(None, 0, False, answer))
            self._out += frames.pack(number, kind, payload)
        self._wake()
        if not done.wait(timeout):
            with self._lock:
                self._routes.pop(number, None)
            raise SandboxError(f"the agent did not answer within {timeout:g} s")
        received = found[0]
        if received is None:
            raise SandboxLost("the virtual machine ended")
        if received.kind == Frame.ERROR:
            fields = received.fields()
            raise SandboxError(
                f"the machine's agent refused: {frames.text_of(fields.get(Tag.MESSAGE))}"
            )
        return received

    def rekeyed(self, secret: bytes, answer: Received) -> None:
        """Take note of a new secret and of the epoch that came with it."""
        epoch = answer.fields().get(Tag.EPOCH, b"")
        with self._lock:
            self.secret = secret
            kept = [(tag, data) for tag, data in frames.split_fields(self._greeting)]
            self._greeting = frames.join_fields(
                [(tag, epoch if tag == Tag.EPOCH else data) for tag, data in kept]
            )

    def hush(self, patience: float) -> bool:
        """Take nothing from clients until `go_on`; True when the agent took all that came before.

        A guest may have stopped its agent, or be busy: it is asked for `patience` seconds.
        Raises SandboxLost.
        """
        with self._lock:
            self._quiet = True
        try:
            self.ask(Frame.PING, timeout=patience)
        except SandboxLost:
            raise
        except SandboxError:
            return False
        return True

    def go_on(self) -> None:
        """Take what clients have to say again."""
        with self._lock:
            self._quiet = False
        self._wake()

    def close(self) -> None:
        """End every line. Does nothing the second time."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(5)
        else:
            self._end()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"1")

    def _take_number(self, route: _Route) -> int:
        number = self._next
        self._next = (self._next + 1) & 0xFFFFFFFF or 1
        self._routes[number] = route
        return number

    # The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._arm()
                for key, events in self._selector.select():
                    with self._lock:
                        self._serve(key.data, events)
                with self._lock:
                    self._flush_port()
        except Exception as error:
            # Whatever it was: a machine that nobody reaches any more shall not seem to be there.
            known = isinstance(error, OSError | SandboxError)
            said = str(error) if known else f"its lines failed ({type(error).__name__}: {error})"
            self._lost = said or "the virtual machine ended"
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            if not self._closed:
                self._on_lost()
            self._lost = self._lost or "the virtual machine ended"
            for line in list(self._lines):
                line.sock.close()
            self._lines.clear()
            for route in self._routes.values():
                if route.answer is not None:
                    route.answer(None)
            self._routes.clear()
            self._listener.close()
            self._port.close()
            self._selector.close()
            for fd in (self._wake_read, self._wake_write):
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._wake_read = self._wake_write = -1

    def _arm(self) -> None:
        """Say what is waited for: a port that is full, or that is to be quiet, stops the clients.

        New ones wait at the door meanwhile, as they do where there are too many already.
        """
        with self._lock:
            full = len(self._out) > _PORT_HIGH or self._quiet
            out = selectors.EVENT_WRITE if self._out else 0
            self._await(self._port, selectors.EVENT_READ | out, "port")
            lets_in = not full and len(self._lines) < _MOST_LINES
            self._await(self._listener, selectors.EVENT_READ if lets_in else 0, "listener")
            for line in self._lines:
                out = selectors.EVENT_WRITE if line.out else 0
                self._await(line.sock, (0 if full else selectors.EVENT_READ) | out, line)

    def _await(self, sock: socket.socket, events: int, what: object) -> None:
        with contextlib.suppress(KeyError):
            if events:
                self._selector.modify(sock, events, what)
            else:
                self._selector.unregister(sock)
            return
        if events:
            self._selector.register(sock, events, what)

    def _serve(self, what: object, events: int) -> None:
        if what == "wake":
            os.read(self._wake_read, 4096)
        elif what == "listener":
            self._welcome()
        elif what == "port":
            if events & selectors.EVENT_READ:
                self._receive()
        elif isinstance(what, _Line) and what in self._lines:
            try:
                if events & selectors.EVENT_WRITE:
                    self._flush(what)
                if events & selectors.EVENT_READ and what in self._lines:
                    self._listen(what)
            except Exception:
                # One client's mistake, or ours about it, is not the others' end.
                self._drop(what)

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            strangers = [line for line in self._lines if not line.known]
            if len(strangers) >= _MOST_STRANGERS:
                self._drop(strangers[0])  # it had the most time to say who it is
            self._lines[_Line(sock)] = None

    # From a client to the port -----------------------------------------------------------------

    def _listen(self, line: _Line) -> None:
        try:
            data = line.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._drop(line)
        if not line.known:
            line.taken += len(data)
        try:
            for frame in line.splitter.feed(data):
                self._take(line, frame)
                if line not in self._lines:
                    return None
        except SandboxError:
            return self._drop(line)
        if not line.known and line.taken > _STRANGER_LIMIT:
            return self._drop(line)
        return None

    def _take(self, line: _Line, frame: Received) -> None:
        if frame.kind == Frame.HELLO:
            given = frame.fields().get(Tag.SECRET, b"")
            if not hmac.compare_digest(given, self.secret):
                self._say(line, frame.number, Frame.ERROR, _refusal("auth", "wrong secret"))
                # Once the refusal is on its way the stranger is not listened to any more.
                return self._drop(line)
            line.known = True
            return self._say(line, frame.number, Frame.OK, self._greeting)
        if not line.known:
            return self._drop(line)
        if frame.kind not in _FROM_CLIENTS:
            refusal = _refusal("bad_request", "this is not a client's to ask")
            return self._say(line, frame.number, Frame.ERROR, refusal)
        known = line.numbers.get(frame.number)
        if frame.kind in _ABOUT_A_COMMAND:
            # A command that ended meanwhile is no mistake.
            if known is not None:
                self._out += frames.pack(known, frame.kind, frame.payload)
            return None
        if known is not None:
            refusal = _refusal("bad_request", "this number is in use")
            return self._say(line, frame.number, Frame.ERROR, refusal)
        route = _Route(line, frame.number, frame.kind == Frame.EXEC)
        number = self._take_number(route)
        line.numbers[frame.number] = number
        if line.held:
            self._out += frames.pack(number, frame.kind, frame.payload)
            self._out += frames.pack(number, Frame.HOLD, frames.join_fields([(Tag.STATE, 1)]))
            return None
        self._out += frames.pack(number, frame.kind, frame.payload)
        return None

    def _drop(self, line: _Line) -> None:
        """Let go of a line and end its commands. Does nothing the second time."""
        if line not in self._lines:
            return
        del self._lines[line]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(line.sock)
        with contextlib.suppress(OSError):
            if line.out:
                line.sock.send(line.out)
        line.sock.close()
        for number in line.numbers.values():
            route = self._routes.get(number)
            if route is None:
                continue
            route.line = None
            if route.command:
                self._out += frames.pack(number, Frame.LEAVE)
                self._strays_left = min(self._strays_left + _STRAYS_OF_ONE, _MOST_STRAYS)
                del self._routes[number]
        line.numbers.clear()

    def _flush_port(self) -> None:
        try:
            while self._out:
                del self._out[: self._port.send(self._out)]
        except BlockingIOError:
            pass

    # From the port to a client -----------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._port.recv(_CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise SandboxLost("the virtual machine ended")
        for frame in self._splitter.feed(data):
            route = self._routes.get(frame.number)
            if route is None:
                self._stray()
                continue
            # The node asks for one answer and takes one: a guest could send others for ever.
            last = (
                route.answer is not None
                or frame.kind in (Frame.OK, Frame.EXIT)
                or (
                    # A signal that found nobody says so, and its command goes on.
                    frame.kind == Frame.ERROR
                    and not (route.command and frame.fields().get(Tag.CODE) == b"failed")
                )
            )
            if last:
                del self._routes[frame.number]
            if route.answer is not None:
                route.answer(frame)
            if route.line is not None:
                if last:
                    route.line.numbers.pop(route.number, None)
                self._say(route.line, route.number, frame.kind, frame.payload)

    def _stray(self) -> None:
        """Count a frame that nobody asked for: they cost this machine's time, not the guest's."""
        self._strays_left -= 1
        if self._strays_left < 0:
            raise SandboxLost("the virtual machine sent too much that nobody had asked for")

    def _say(self, line: _Line, number: int, kind: int, payload: bytes) -> None:
        line.out += frames.pack(number, kind, payload)
        self._flush(line)
        if line not in self._lines:
            return
        if len(line.out) > _TOO_MUCH:
            self._drop(line)
        elif len(line.out) > _HIGH and not line.held:
            self._hold(line, True)

    def _flush(self, line: _Line) -> None:
        try:
            while line.out:
                del line.out[: line.sock.send(line.out)]
        except BlockingIOError:
            pass
        except OSError:
            return self._drop(line)
        if line.held and len(line.out) < _LOW:
            self._hold(line, False)
        return None

    def _hold(self, line: _Line, on: bool) -> None:
        line.held = on
        for number in line.numbers.values():
            route = self._routes.get(number)
            if route is not None and route.command:
                payload = frames.join_fields([(Tag.STATE, int(on))])
                self._out += frames.pack(number, Frame.HOLD, payload)


def _refusal(code: str, message: str) -> bytes:
    return frames.join_fields([(Tag.CODE, code), (Tag.ERRNO, 0), (Tag.MESSAGE, message)])

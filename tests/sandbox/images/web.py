"""A web server on the loopback that serves a folder with ranges, and counts what it sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Served:
    """What was asked of the server. `damage` may change what is sent for a path."""

    def __init__(self) -> None:
        self.address = ""
        self.sent: dict[str, int] = {}
        self.damage: Callable[[str, bytes], bytes] | None = None
        self.ranges = True
        self.down = False
        self.drips = False

    def bytes_of(self, word: str) -> int:
        return sum(count for path, count in self.sent.items() if word in path)


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path)
            file = folder / path.lstrip("/")
            if served.down or not file.is_file():
                self.send_error(503 if served.down else 404)
                return
            content, status = file.read_bytes(), 200
            asked = self.headers.get("Range")
            if asked and served.ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                if int(first) >= len(content):
                    self.send_error(416)
                    return
                content, status = content[int(first) : int(last) + 1], 206
            if served.damage:
                content = served.damage(path, content)
            served.sent[path] = served.sent.get(path, 0) + len(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                while served.drips and content:
                    self.wfile.write(content[:1])
                    content = content[1:]
                    time.sleep(0.02)
                self.wfile.write(content)
            except OSError:
                return

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

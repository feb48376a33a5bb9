"""A daemon for tests, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fathom.errors import DaemonLost
from fathom.sandbox import SyncClient
from fathom.sandbox.edge import certificate
from fathom.sandbox.edge.tokens import Tokens

REPOSITORY = Path(__file__).resolve().parents[3]
SERVE = """
import json, sys
from pathlib import Path
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.parent import Listen, Parent
from fathom.sandbox.host import LocalHost
folder, cache, most, work, tls = sys.argv[1:]
host = LocalHost("auto", Path(cache), Path(folder))
keeper = Keeper(host, most=int(most), spare=0, work=tuple(map(Path, filter(None, [work]))))
if tls:
    paths = {name: Path(tls, file) for name, file in
        (("certificate", "certificate.pem"), ("key", "key.pem"), ("tokens", "tokens.json"))}
    listen = Listen(host="127.0.0.1", port=0, **paths)
    Parent(keeper, listen).run(lambda address: print(address[1], flush=True))
else:
    Parent(keeper).run()
"""


class Daemon:
    """`tls`: a folder for certificate and tokens, where it shall listen for clients elsewhere."""

    def __init__(
        self, folder: Path, cache: Path, work: Path | None = None, tls: Path | None = None
    ) -> None:
        self.folder, self.cache, self.work, self.tls = folder, cache, work, tls
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        if tls is not None:
            certificate.own(tls, "127.0.0.1")

    def command(self, most: int) -> list[str]:
        arguments = [self.folder, self.cache, most, self.work or "", self.tls or ""]
        return [sys.executable, "-c", SERVE, *map(str, arguments)]

    def start(self, most: int = 6) -> None:
        self.process = subprocess.Popen(
            self.command(most),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            text=True,
        )
        if self.tls is not None:
            assert self.process.stdout is not None
            self.port = int(self.process.stdout.readline())
        deadline = time.monotonic() + 30
        while True:
            try:
                with self.client() as client:
                    client.list()
                return
            except DaemonLost:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def end(self, number: int) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.send_signal(number)
        self.process.wait(20)
        self.process.stdout.close()

    def client(self) -> SyncClient:
        return SyncClient("edge", runtime_dir=self.folder, cache_dir=self.cache)

    @property
    def tokens(self) -> Tokens:
        assert self.tls is not None
        return Tokens(self.tls / "tokens.json")

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def fingerprint(self) -> str:
        assert self.tls is not None
        return certificate.fingerprint(self.tls / "certificate.pem")

    def processes(self, module: str) -> list[int]:
        """The processes of this daemon that run `module`, its `api` or its node."""
        assert self.process is not None
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == self.process.pid and any(module in word for word in words):
                found.append(int(path.name))
        return found

    def remove(self) -> None:
        """End it and every sandbox, by way of a kill, and see that nothing is left."""
        self.end(9)
        self.start()
        with self.client() as client:
            for entry in client.list():
                client.attach(entry["id"]).stop()
        self.end(15)
        left = [path for path in self.folder.iterdir() if path.is_dir()]
        assert left == []
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

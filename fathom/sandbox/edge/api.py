"""The API process: reads what clients send, and may do nothing else.

Started by the parent, it loads what it needs, gives up its rights (`confine`) and only then looks
at its sockets. It keeps nothing that another one could not learn from the parent.

Paper: §5.2.5 (the one surface of a node).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

from fathom.sandbox.edge.confine import confine
from fathom.sandbox.edge.front import Front
from fathom.sandbox.edge.https_server import HttpsServer, Site, load
from fathom.sandbox.edge.unix_server import UnixServer
from fathom.sandbox.edge.upcall import Upcall


async def _serve(
    channel: socket.socket, unix: socket.socket, tcp: socket.socket | None, site: Site | None
) -> None:
    front = Front()
    front.upcall = Upcall(channel, front.forget)
    await front.begin()
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(front.upcall.ended.wait()),
        asyncio.create_task(front.mind()),
        asyncio.create_task(UnixServer(unix, front).serve()),
    ]
    if tcp is not None and site is not None:
        tasks.append(asyncio.create_task(HttpsServer(tcp, site, front).serve()))
    await front.upcall.ask("ready", {})
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()  # raises what went wrong


def main(argv: list[str]) -> None:
    """Run the API process: what the parent gives it comes as one JSON argument."""
    given: dict[str, Any] = json.loads(argv[0])
    logging.basicConfig(
        level=logging.INFO, format="level=%(levelname)s logger=%(name)s %(message)s"
    )
    channel, unix = (socket.socket(fileno=given[name]) for name in ("channel", "unix"))
    tcp = socket.socket(fileno=given["tcp"]) if given["tcp"] is not None else None
    site = load(given["certificate"], given["key"]) if tcp is not None else None
    root = given["root"]
    confine(given["user"], Path(root) if root is not None else None, given["parent"])
    asyncio.run(_serve(channel, unix, tcp, site))

"""The part of the common surface that a pool of interpreters cannot have, each said in a sentence.

Nothing is kept between two of its calls, so there is nothing to stream from, write to, copy or stop
for a while; what is left of the surface is in `fn.py`.

Paper: §5.2.5 (one surface; what a type cannot do it says).
"""

from __future__ import annotations

from typing import Any, NoReturn

from fathom.errors import Unsupported


def _refuse(what: str) -> NoReturn:
    raise Unsupported(
        f"a pool of interpreters has no {what}: it keeps nothing between two calls; use Container, "
        "MicroVM or FullVM"
    )


class Stateless:
    """Methods of a sandbox that raise Unsupported."""

    @property
    def files(self) -> Any:
        """Raises Unsupported."""
        _refuse("files")

    async def run(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("running commands")

    async def pty(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("terminals")

    async def fork(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("copies")

    async def snapshot(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("snapshots")

    async def pack_diff(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("layers")

    async def pause(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("pause")

    async def resume(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("resume")

    async def phase(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("phases")

    async def screenshot(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("screenshots")

    async def stats(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("figures of one sandbox")

    async def network_log(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("network")

    async def receipt(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("receipts")

    async def acknowledge(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("receipts")

    async def ping(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("agent of its own")

    def forward(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("ports")


class SyncStateless:
    """The same without `await`."""

    @property
    def files(self) -> Any:
        """Raises Unsupported."""
        _refuse("files")

    def run(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("running commands")

    def pty(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("terminals")

    def fork(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("copies")

    def snapshot(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("snapshots")

    def pack_diff(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("layers")

    def pause(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("pause")

    def resume(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("resume")

    def phase(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("phases")

    def screenshot(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("screenshots")

    def stats(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("figures of one sandbox")

    def network_log(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("network")

    def receipt(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("receipts")

    def acknowledge(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("receipts")

    def ping(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("agent of its own")

    def forward(self, *_: object, **__: object) -> Any:
        """Raises Unsupported."""
        _refuse("ports")

"""What earlier requests computed, found again by the tokens themselves.

A full slab is named by a hash of all tokens up to its end. A hit is the longest chain of slabs,
then the newest checkpoint along it; a chain without a checkpoint near its end is made good by
replaying some tokens over known entries.

Slabs live on the device as long as nobody needs the room, then in host memory, then on disk;
checkpoints in host memory, then on disk. All tiers hold the same bytes under the same name.

Paper: §3.5.2 (on-disk KV cache: compressed entries always; sliding windows fully, at checkpoints or
not at all).
"""

from __future__ import annotations

import contextlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from fathom.engine.checkpoints import Checkpoint, Checkpoints, Openings, encode_checkpoint, name_of
from fathom.engine.disk_cache import DiskCache
from fathom.engine.kv_cache import NO_MEMORY, SLAB_TOKENS, SlabPool
from fathom.engine.lru import LRU
from fathom.errors import CacheError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What is known of a prompt: `start` tokens need not be computed, and entries of the first
    `known` tokens lie in slabs `chain`. `checkpoint`, named `key`, is the state at `start`; without
    one the state there is empty.
    """

    start: int = 0
    known: int = 0
    chain: tuple[bytes, ...] = ()
    key: bytes = b""
    checkpoint: Checkpoint | None = None


@dataclass(slots=True)
class TierStats:
    """Tokens found, by the tier that had them."""

    device: int = 0
    host: int = 0
    disk: int = 0


class PrefixCache:
    """Finds and keeps slabs and checkpoints. `root` names model, formats and weights."""

    def __init__(
        self,
        root: bytes,
        slabs: SlabPool,
        *,
        host_bytes: int,
        checkpoint_bytes: int,
        disk: DiskCache | None = None,
    ) -> None:
        self.root, self.slabs, self.disk = root, slabs, disk
        self.stats = TierStats()
        self.openings = Openings()
        self.checkpoints = Checkpoints(checkpoint_bytes, disk)
        self._device: OrderedDict[bytes, int] = OrderedDict()
        self._host: LRU[bytes] = LRU(host_bytes)

    def chain(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The names of all full slabs of a sequence, continuing those already computed."""
        chain = list(known)
        for i in range(len(chain), len(tokens) // SLAB_TOKENS):
            part = tokens[i * SLAB_TOKENS : (i + 1) * SLAB_TOKENS]
            chain.append(name_of(chain[-1] if chain else self.root, part, b"slab"))
        return chain

    def find(self, tokens: Sequence[int], replay: int, anew: bool = False) -> Hit:
        """The best start for a sequence; never beyond its last token without a hidden state.

        replay: how many tokens before a slab's end rebuild the state there. anew: all tokens are to
        be computed, over the entries that are known.
        """
        chain = self._known_chain(tokens)
        known = len(chain) * SLAB_TOKENS
        if anew:
            return Hit(known=known, chain=chain)
        key, checkpoint = self._newest_checkpoint(tokens, chain) or (b"", None)
        start = checkpoint.position if checkpoint is not None else 0
        replayed = min(known, len(tokens) - 1) - replay
        if replayed > start:
            return Hit(start=replayed, known=known, chain=chain)
        return Hit(start=start, known=known, chain=chain, key=key, checkpoint=checkpoint)

    def _known_chain(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        chain = self.chain(tokens)
        for length, name in enumerate(chain):
            if not self._has_slab(name):
                return tuple(chain[:length])
        return tuple(chain)

    def _newest_checkpoint(
        self, tokens: Sequence[int], chain: Sequence[bytes], whole: bool = False
    ) -> tuple[bytes, Checkpoint] | None:
        for length in range(len(chain), -1, -1):
            parent = chain[length - 1] if length else self.root
            found = self.checkpoints.find(parent, tokens, length * SLAB_TOKENS, whole)
            if found is not None:
                return found
        return None

    def acquire(self, chain: Sequence[bytes]) -> list[int] | None:
        """The device slabs of a chain, each with a reference; loaded from other tiers if need be.

        None when one turned out to be damaged: it is gone then, and nothing is held. Raises
        CacheFull without room on the device.
        """
        for name in chain:  # what is there already must not make room for the rest
            if name in self._device:
                self._device.move_to_end(name)
        held: list[int] = []
        try:
            for name in chain:
                slab = self._acquire(name)
                if slab is None:
                    break
                held.append(slab)
            if len(held) == len(chain):
                return held
        except BaseException:
            self._release(held)
            raise
        self._release(held)
        return None

    def _acquire(self, name: bytes) -> int | None:
        if name in self._device:
            self.slabs.share(self._device[name])
            self.stats.device += SLAB_TOKENS
            return self._device[name]
        record = self._host.get(name)
        if record is not None:
            self.stats.host += SLAB_TOKENS
        elif self.disk is not None:
            record = self.disk.read("slab", name)
            if record is not None and len(record) != self.slabs.layout.slab_bytes:
                self.disk.remove("slab", name)
                record = None
            if record is not None:
                self.stats.disk += SLAB_TOKENS
        if record is None:
            return None
        slab = self.take_slab()
        self.slabs.write(slab, record)
        self.keep_slab(name, slab)
        return slab

    def _release(self, slabs: Sequence[int]) -> None:
        for slab in slabs:
            self.slabs.release(slab)

    def take_slab(self) -> int:
        """A free slab; one that only this cache holds moves to host memory to make room.

        Raises CacheFull when requests hold all of them.
        """
        if not self.slabs.free:
            self._demote(1)
        return self.slabs.take()

    def available(self) -> int:
        """Slabs that could be handed out now."""
        idle = sum(1 for slab in self._device.values() if self.slabs.references(slab) == 1)
        return self.slabs.free + idle

    def held(self, chain: Sequence[bytes]) -> int:
        """How many of these slabs requests hold on the device already."""
        slabs = (self._device.get(key) for key in chain)
        return sum(1 for s in slabs if s is not None and self.slabs.references(s) > 1)

    def keep_slab(self, name: bytes, slab: int) -> None:
        """Share a full slab under its name; a second copy of the same content is not kept."""
        if name not in self._device:
            self.slabs.share(slab)
            self._device[name] = slab

    def persist(self, chain: Sequence[bytes], checkpoints: Sequence[bytes], found: int) -> None:
        """Write a chain of slabs and some checkpoints to disk, if there is one, now.

        The first `found` slabs came out of the cache; the others have been computed, and replace a
        file of the same name that nobody could have used. Raises CacheError when it cannot be
        written.
        """
        if self.disk is None:
            return
        for i, name in enumerate(chain):
            record = self._record(name) if i >= found or not self.disk.has("slab", name) else None
            if record is not None:
                self.disk.write("slab", name, record)
        for key in checkpoints:
            kept = self.checkpoints.memory.get(key)
            if kept is not None and (kept[1].hidden or not self.disk.has("state", key)):
                self.disk.write("state", key, encode_checkpoint(*kept))

    def pin(self, tokens: Sequence[int]) -> None:
        """Protect what is known of a sequence in host memory, where there is no disk."""
        chain = self._known_chain(tokens)
        self._host.pinned.update(chain)
        found = self._newest_checkpoint(tokens, chain, whole=True)
        if found is not None:
            self.checkpoints.memory.pinned.add(found[0])

    def save(self, tokens: Sequence[int]) -> bytes:
        """Write what is known of a sequence to disk, pinned, with its tokens; returns its name.

        Raises CacheError without a disk, when it cannot be written, or when nothing is known of it;
        then nothing stays pinned for it, unless it was saved before.
        """
        disk = self._required_disk()
        chain = self._known_chain(tokens)
        found = self._newest_checkpoint(tokens, chain, whole=True)
        if found is None and not chain:
            raise CacheError("nothing of this sequence is in the cache: there is nothing to save")
        name = name_of(self.root, tokens, b"session")
        state = found[0] if found is not None else bytes(16)
        saved_before = disk.has("session", name)
        try:
            for kind, key in self._parts(tokens, state):  # before anything makes room
                disk.pin(kind, key)
            disk.write("session", name, state + array("I", tokens).tobytes(), pin=True)
            for key in chain:
                if not disk.has("slab", key):
                    disk.write("slab", key, self._record(key) or b"", pin=True)
            kept = self.checkpoints.memory.get(state)
            if kept is not None and not disk.has("state", state):
                disk.write("state", state, encode_checkpoint(*kept), pin=True)
        except CacheError:
            if not saved_before:
                disk.remove("session", name)
            self._unpin(tokens, state)
            raise
        return name

    def load(self, name: bytes) -> list[int]:
        """The tokens of a saved sequence. Raises CacheError when it is not there or damaged."""
        return self._read_session(name)[1]

    def forget(self, name: bytes) -> None:
        """Delete a saved sequence; what no other one needs is kept as long as there is room.

        Raises CacheError when it is not there or damaged.
        """
        state, tokens = self._read_session(name)
        self._required_disk().remove("session", name)
        self._unpin(tokens, state)

    def _unpin(self, tokens: Sequence[int], state: bytes) -> None:
        """Let go of what a session pinned, as far as no session that is there needs it."""
        disk = self._required_disk()
        needed: set[tuple[str, bytes]] = set()
        for other in disk.keys("session"):
            with contextlib.suppress(CacheError):
                other_state, other_tokens = self._read_session(other)
                needed |= self._parts(other_tokens, other_state)
        for kind, key in self._parts(tokens, state) - needed:
            disk.pin(kind, key, pinned=False)

    def _read_session(self, name: bytes) -> tuple[bytes, list[int]]:
        disk = self._required_disk()
        record = disk.read("session", name)
        if record is None or len(record) < 16 or len(record) % 4:
            raise CacheError(
                f"no session {name.hex()} of this model in {disk.folder}, or it is damaged"
            )
        return record[:16], list(array("I", record[16:]))

    def _parts(self, tokens: Sequence[int], state: bytes) -> set[tuple[str, bytes]]:
        return {("state", state), *(("slab", key) for key in self.chain(tokens))}

    def _required_disk(self) -> DiskCache:
        if self.disk is None:
            raise CacheError("this engine has no disk cache: set disk to a folder")
        return self.disk

    def use_disk(self, disk: DiskCache | None) -> None:
        """The disk tier from now on."""
        self.disk = self.checkpoints.disk = disk

    def clear(self, root: bytes | None = None) -> None:
        """Forget everything in memory; with the new name after a change of weights, disk too."""
        self._release(list(self._device.values()))
        self._device.clear()
        self._host.clear()
        self.checkpoints.clear()
        self.openings.clear()
        if root is not None:
            self.root = root
            self.use_disk(None)

    def occupancy(self) -> dict[str, tuple[int, int]]:
        """Per tier (tokens, bytes) of entries; checkpoints count as bytes of the host."""
        size = self.slabs.layout.slab_bytes
        host = self._host.size + self.checkpoints.memory.size
        tiers = {
            "device": (len(self._device) * SLAB_TOKENS, len(self._device) * size),
            "host": (len(self._host) * SLAB_TOKENS, host),
        }
        if self.disk is not None:
            tiers["disk"] = (self.disk.count("slab") * SLAB_TOKENS, self.disk.size)
        return tiers

    def _has_slab(self, name: bytes) -> bool:
        return (
            name in self._device
            or name in self._host
            or (self.disk is not None and self.disk.has("slab", name))
        )

    def _record(self, name: bytes) -> bytes | None:
        if name in self._device:
            return self.slabs.read(self._device[name])
        return self._host.get(name)

    def _demote(self, count: int) -> None:
        for name, slab in list(self._device.items()):
            if count == 0:
                return
            if self.slabs.references(slab) > 1:
                continue
            with contextlib.suppress(*NO_MEMORY):  # then it is lost, which costs time only
                self._move_down(name, self.slabs.read(slab))
            del self._device[name]
            self.slabs.release(slab)
            count -= 1

    def _move_down(self, name: bytes, record: bytes) -> None:
        gone = [(name, record)]
        if self._host.limit >= len(record):
            gone = self._host.put(name, record, len(record))
        if self.disk is not None:
            for old, value in gone:
                self.disk.write_if_possible("slab", old, value)

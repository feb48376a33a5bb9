"""What earlier requests computed, found again by the tokens themselves.

A full slab is named by a hash of all tokens up to its end; a checkpoint by the slabs before it and
the tokens after them. A hit is the longest chain of slabs, then the newest checkpoint along it; a
chain without a checkpoint near its end is made good by replaying some tokens over known entries.

Slabs live on the device as long as nobody needs the room, then in host memory, then on disk;
checkpoints in host memory, then on disk. All tiers hold the same bytes under the same name.

Paper: §3.5.2 (on-disk KV cache: compressed entries always; sliding windows fully, at checkpoints or
not at all).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fathom.engine.disk_cache import DiskCache
from fathom.engine.kv_cache import SLAB_TOKENS, SlabPool
from fathom.engine.state_cache import SlotPool
from fathom.errors import CacheError

MIN_SHARED = 32  # tokens: a shorter common opening is not worth a checkpoint
RECENT = 16  # sequences whose openings are compared with new prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after `position` tokens: slot record, entries of the slab begun, and, for a prompt
    that may be asked again, the final hidden state of its last token (float32).
    """

    position: int
    tail: tuple[int, ...]
    state: bytes
    entries: bytes
    hidden: bytes = b""

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self.state) + len(self.entries) + len(self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What is known of a prompt: `start` tokens need not be computed, and entries of the first
    `known` tokens lie in slabs `chain`. `checkpoint` None: begin at `start` with an empty state.
    """

    start: int = 0
    known: int = 0
    chain: tuple[bytes, ...] = ()
    checkpoint: Checkpoint | None = None


@dataclass(slots=True)
class TierStats:
    """Tokens found, by the tier that had them."""

    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(slots=True)
class _Host:
    """Records in host memory, the least recently used first; at most `limit` bytes."""

    limit: int
    records: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    size: int = 0

    def put(self, key: bytes, record: bytes) -> list[tuple[bytes, bytes]]:
        """Keep a record; returns the ones that had to go."""
        if key in self.records:
            self.records.move_to_end(key)
            return []
        self.records[key] = record
        self.size += len(record)
        gone = []
        while self.size > self.limit:
            old, value = self.records.popitem(last=False)
            self.size -= len(value)
            gone.append((old, value))
        return gone

    def get(self, key: bytes) -> bytes | None:
        record = self.records.get(key)
        if record is not None:
            self.records.move_to_end(key)
        return record


class PrefixCache:
    """Finds and keeps slabs and checkpoints. `root` names model, formats and weights."""

    def __init__(
        self,
        root: bytes,
        slabs: SlabPool,
        slots: SlotPool,
        *,
        host_bytes: int,
        checkpoint_bytes: int,
        disk: DiskCache | None = None,
    ) -> None:
        self.root, self.slabs, self.slots, self.disk = root, slabs, slots, disk
        self.stats = TierStats()
        self._device: OrderedDict[bytes, int] = OrderedDict()
        self._host = _Host(host_bytes)
        self._checkpoint_limit, self.checkpoint_bytes = checkpoint_bytes, 0
        self._checkpoints: OrderedDict[bytes, tuple[bytes, Checkpoint]] = OrderedDict()
        self._by_parent: dict[bytes, set[bytes]] = {}
        self._recent: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def chain(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The names of all full slabs of a sequence, continuing those already computed."""
        chain = list(known)
        for i in range(len(chain), len(tokens) // SLAB_TOKENS):
            part = tokens[i * SLAB_TOKENS : (i + 1) * SLAB_TOKENS]
            chain.append(_name(chain[-1] if chain else self.root, part))
        return chain

    def find(self, tokens: Sequence[int], replay: int) -> Hit:
        """The best start for a sequence; never beyond its last token without a hidden state.

        replay: how many tokens before a slab's end rebuild the state there.
        """
        chain = self.chain(tokens)
        length = 0
        while length < len(chain) and self._has_slab(chain[length]):
            length += 1
        found = self._newest_checkpoint(tokens, chain[:length])
        known = length * SLAB_TOKENS
        start = found.position if found is not None else 0
        replayed = min(known, len(tokens) - 1) - replay
        if known < len(tokens) and replayed > start:
            return Hit(start=replayed, known=known, chain=tuple(chain[:length]))
        return Hit(start=start, known=known, chain=tuple(chain[:length]), checkpoint=found)

    def _newest_checkpoint(
        self, tokens: Sequence[int], chain: Sequence[bytes], whole: bool = False
    ) -> Checkpoint | None:
        for length in range(len(chain), -1, -1):
            parent = chain[length - 1] if length else self.root
            best: tuple[bytes, Checkpoint] | None = None
            for key in self._checkpoint_keys(parent):
                checkpoint = self._load_checkpoint(key)
                if checkpoint is None:
                    continue
                end = checkpoint.position
                fits = end < len(tokens) or (end == len(tokens) and (whole or checkpoint.hidden))
                if (
                    fits
                    and tuple(tokens[length * SLAB_TOKENS : end]) == checkpoint.tail
                    and (best is None or end > best[1].position)
                ):
                    best = key, checkpoint
            if best is not None:
                if best[0] in self._checkpoints:
                    self._checkpoints.move_to_end(best[0])
                return best[1]
        return None

    def shared_opening(self, tokens: Sequence[int], start: int) -> int:
        """Where `tokens` part from the most similar recent sequence, if a checkpoint pays there."""
        whole = np.asarray(tokens)
        longest = 0
        for other in self._recent:
            size = min(len(other), len(tokens))
            differs = np.flatnonzero(whole[:size] != np.asarray(other[:size]))
            longest = max(longest, int(differs[0]) if len(differs) else size)
        return longest if max(MIN_SHARED, start + 1) <= longest < len(tokens) else 0

    def remember(self, tokens: Sequence[int]) -> None:
        """Compare later prompts with this sequence."""
        self._recent[tuple(tokens)] = None
        self._recent.move_to_end(tuple(tokens))
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def acquire(self, key: bytes) -> int | None:
        """The device slab with this name, with a reference, loaded from another tier if need be.

        None when a file turned out to be damaged. Raises CacheFull without room on the device.
        """
        if key in self._device:
            self._device.move_to_end(key)
            self.slabs.share(self._device[key])
            self.stats.device += SLAB_TOKENS
            return self._device[key]
        record = self._host.get(key)
        if record is not None:
            self.stats.host += SLAB_TOKENS
        elif self.disk is not None:
            record = self.disk.read("slab", key)
            if record is not None:
                self.stats.disk += SLAB_TOKENS
        if record is None or len(record) != self.slabs.layout.slab_bytes:
            return None
        slab = self.take_slab()
        self.slabs.write(slab, record)
        self.keep_slab(key, slab)
        return slab

    def take_slab(self) -> int:
        """A free slab; one that only this cache holds moves to host memory to make room.

        Raises CacheFull when requests hold all of them.
        """
        if not self.slabs.free:
            self._demote(1)
        return self.slabs.take()

    def available(self) -> int:
        """Slabs that could be handed out now."""
        return self.slabs.free + sum(
            1 for s in self._device.values() if self.slabs.references(s) == 1
        )

    def keep_slab(self, key: bytes, slab: int) -> None:
        """Share a full slab under its name; a second copy of the same content is not kept."""
        if key not in self._device:
            self.slabs.share(slab)
            self._device[key] = slab

    def keep_checkpoint(self, parent: bytes, checkpoint: Checkpoint) -> bytes:
        """Keep a checkpoint whose full slabs end with `parent`; returns its name."""
        key = _name(parent, checkpoint.tail, b"state")
        old = self._checkpoints.get(key)
        if old is not None:
            if len(old[1].hidden) >= len(checkpoint.hidden):
                self._checkpoints.move_to_end(key)
                return key
            self._forget(key)
        self._checkpoints[key] = parent, checkpoint
        self._by_parent.setdefault(parent, set()).add(key)
        self.checkpoint_bytes += checkpoint.size
        while self.checkpoint_bytes > self._checkpoint_limit and len(self._checkpoints) > 1:
            self._forget(next(iter(self._checkpoints)))
        return key

    def persist(
        self,
        chain: Sequence[bytes],
        checkpoints: Sequence[bytes],
        pin: bool = False,
        found: int | None = None,
    ) -> None:
        """Write a chain of slabs and some checkpoints to disk, if there is one, now.

        The first `found` slabs came out of the cache (None: all); the others have been computed,
        and replace a file of the same name that nobody could have used. Raises CacheError when it
        cannot be written.
        """
        if self.disk is None:
            return
        for i, name in enumerate(chain):
            fresh = found is not None and i >= found
            record = self._record(name) if fresh or not self.disk.has("slab", name) else None
            if record is not None:
                self.disk.remove("slab", name)
                self.disk.write("slab", name, record, pin=pin)
            elif pin:
                self.disk.pin("slab", name)
        for key in checkpoints:
            if key in self._checkpoints:
                record = encode_checkpoint(*self._checkpoints[key])
                self.disk.write("state", key, record, pin=pin)

    def save(self, tokens: Sequence[int]) -> bytes:
        """Write what is known of a sequence to disk, pinned, with its tokens; returns its name.

        Raises CacheError when it cannot be written, or when nothing is known of it.
        """
        assert self.disk is not None
        chain = self.chain(tokens)
        length = 0
        while length < len(chain) and self._has_slab(chain[length]):
            length += 1
        found = self._newest_checkpoint(tokens, chain[:length], whole=True)
        if found is None and not length:
            raise CacheError("nothing of this sequence is in the cache: there is nothing to save")
        keys = []
        if found is not None:
            full = found.position // SLAB_TOKENS
            keys = [_name(chain[full - 1] if full else self.root, found.tail, b"state")]
        self.persist(chain[:length], keys, pin=True)
        name = _name(self.root, tokens, b"tokens")
        self.disk.write("tokens", name, array("I", tokens).tobytes(), pin=True)
        return name

    def load(self, name: bytes) -> list[int]:
        """The tokens of a saved sequence. Raises CacheError when it is not there or damaged."""
        assert self.disk is not None
        record = self.disk.read("tokens", name)
        if record is None:
            raise CacheError(
                f"no session {name.hex()} of this model in {self.disk.folder}, or it is damaged"
            )
        return list(array("I", record))

    def held(self, chain: Sequence[bytes]) -> int:
        """How many of these slabs requests hold on the device already."""
        slabs = (self._device.get(key) for key in chain)
        return sum(1 for s in slabs if s is not None and self.slabs.references(s) > 1)

    def forget_checkpoint(self, hit: Hit) -> None:
        """Drop a hit's checkpoint, in memory and on disk: it did not fit."""
        if hit.checkpoint is None:
            return
        full = hit.checkpoint.position // SLAB_TOKENS
        parent = hit.chain[full - 1] if full else self.root
        key = _name(parent, hit.checkpoint.tail, b"state")
        if key in self._checkpoints:
            self._forget(key)
        if self.disk is not None:
            self.disk.remove("state", key)

    def clear(self, root: bytes | None = None) -> None:
        """Forget everything in memory, as after the weights changed; `root` is the new name."""
        for slab in self._device.values():
            self.slabs.release(slab)
        self._device.clear()
        self._host = _Host(self._host.limit)
        self._checkpoints.clear()
        self._by_parent.clear()
        self._recent.clear()
        self.checkpoint_bytes = 0
        self.root = root or self.root

    def drop_device(self) -> None:
        """Move every slab that no request holds to host memory."""
        self._demote(len(self._device))

    def drop_host(self) -> None:
        """Forget what host memory holds; disk stays."""
        self._host = _Host(self._host.limit)
        for key in list(self._checkpoints):
            self._forget(key)

    def occupancy(self) -> dict[str, tuple[int, int]]:
        """Per tier (tokens, bytes) of entries; checkpoints count as bytes of the host."""
        size = self.slabs.layout.slab_bytes
        tiers = {
            "device": (len(self._device) * SLAB_TOKENS, len(self._device) * size),
            "host": (
                len(self._host.records) * SLAB_TOKENS,
                self._host.size + self.checkpoint_bytes,
            ),
        }
        if self.disk is not None:
            tiers["disk"] = (self.disk.count("slab") * SLAB_TOKENS, self.disk.size)
        return tiers

    def _has_slab(self, key: bytes) -> bool:
        return (
            key in self._device
            or key in self._host.records
            or (self.disk is not None and self.disk.has("slab", key))
        )

    def _record(self, key: bytes) -> bytes | None:
        if key in self._device:
            return self.slabs.read(self._device[key])
        return self._host.get(key)

    def _demote(self, count: int) -> None:
        for key, slab in list(self._device.items()):
            if count == 0:
                return
            if self.slabs.references(slab) > 1:
                continue
            if self._host.limit >= self.slabs.layout.slab_bytes:
                for name, record in self._host.put(key, self.slabs.read(slab)):
                    self._to_disk(name, record)
            else:
                self._to_disk(key, self.slabs.read(slab))
            del self._device[key]
            self.slabs.release(slab)
            count -= 1

    def _to_disk(self, key: bytes, record: bytes) -> None:
        if self.disk is not None and self.disk.writable:
            self.disk.write_if_possible("slab", key, record)

    def _checkpoint_keys(self, parent: bytes) -> set[bytes]:
        keys = set(self._by_parent.get(parent, ()))
        if self.disk is not None:
            keys |= self.disk.children(parent)
        return keys

    def _load_checkpoint(self, key: bytes) -> Checkpoint | None:
        if key in self._checkpoints:
            return self._checkpoints[key][1]
        if self.disk is None:
            return None
        record = self.disk.read("state", key)
        decoded = decode_checkpoint(record) if record is not None else None
        if decoded is None:
            return None
        self.keep_checkpoint(*decoded)
        return decoded[1]

    def _forget(self, key: bytes) -> None:
        parent, checkpoint = self._checkpoints.pop(key)
        self.checkpoint_bytes -= checkpoint.size
        siblings = self._by_parent[parent]
        siblings.discard(key)
        if not siblings:
            del self._by_parent[parent]


def _name(parent: bytes, tokens: Sequence[int], kind: bytes = b"slab") -> bytes:
    digest = hashlib.blake2b(parent, digest_size=16, person=kind)
    digest.update(array("I", tokens).tobytes())
    return digest.digest()


def encode_checkpoint(parent: bytes, checkpoint: Checkpoint) -> bytes:
    """The record of a checkpoint: parent, lengths, then its parts."""
    tail = array("I", checkpoint.tail).tobytes()
    parts = (tail, checkpoint.state, checkpoint.entries, checkpoint.hidden)
    lengths = array("Q", [checkpoint.position, *map(len, parts)]).tobytes()
    return parent + lengths + b"".join(parts)


def decode_checkpoint(record: bytes) -> tuple[bytes, Checkpoint] | None:
    """Undo `encode_checkpoint`; None for bytes that are no such record."""
    if len(record) < 56:
        return None
    position, *lengths = array("Q", record[16:56])
    if sum(lengths) + 56 != len(record) or lengths[0] % 4:
        return None
    parts, at = [], 56
    for length in lengths:
        parts.append(record[at : at + length])
        at += length
    tail = tuple(array("I", parts[0]))
    if position % SLAB_TOKENS != len(tail):
        return None
    return record[:16], Checkpoint(
        position=position, tail=tail, state=parts[1], entries=parts[2], hidden=parts[3]
    )

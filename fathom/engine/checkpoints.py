"""Checkpoints: the state after some tokens, in host memory and on disk, found by the tokens.

A checkpoint is named by the slabs before it and the tokens after them, so that one look at its name
says whether there is one for given tokens.

Paper: §3.5.2 (checkpoints of the sliding windows).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fathom.engine.disk_cache import DiskCache
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.lru import LRU

MIN_SHARED = 32  # tokens: a shorter common opening is not worth a checkpoint
RECENT = 16  # sequences whose openings are compared with new prompts
NAME_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after `position` tokens: slot record, entries of the slab begun, and, for a prompt
    that may be asked again, the final hidden state of its last token (float32). `tail`: the tokens
    of the slab begun.
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


def name_of(parent: bytes, tokens: Sequence[int], kind: bytes) -> bytes:
    """16 bytes that name what comes after `parent` with these tokens."""
    digest = hashlib.blake2b(parent, digest_size=NAME_BYTES, person=kind)
    digest.update(array("I", tokens).tobytes())
    return digest.digest()


class Checkpoints:
    """All checkpoints of one model; at most `limit` bytes of them in memory."""

    def __init__(self, limit: int, disk: DiskCache | None) -> None:
        self.disk = disk
        self.memory: LRU[tuple[bytes, Checkpoint]] = LRU(limit)
        self._parents: Counter[bytes] = Counter()  # of those in memory

    def keep(self, parent: bytes, checkpoint: Checkpoint) -> bytes:
        """Keep a checkpoint whose full slabs end with `parent`; returns its name."""
        key = name_of(parent, checkpoint.tail, b"state")
        old = self.memory.get(key)
        if old is not None and len(old[1].hidden) >= len(checkpoint.hidden):
            return key
        if old is None:
            self._parents[parent] += 1
        for _, (other, _) in self.memory.put(key, (parent, checkpoint), checkpoint.size):
            self._count_down(other)
        return key

    def find(
        self, parent: bytes, tokens: Sequence[int], before: int, whole: bool
    ) -> tuple[bytes, Checkpoint] | None:
        """The longest one along `tokens` whose full slabs hold `before` tokens and end with
        `parent`, with its name. One that takes all tokens serves only with a hidden state, or if
        `whole`.
        """
        on_disk = self.disk is not None and self.disk.has_states_after(parent)
        if not on_disk and not self._parents[parent]:
            return None
        tail = tuple(tokens[before : before + SLAB_TOKENS - 1])
        digest, names = hashlib.blake2b(parent, digest_size=NAME_BYTES, person=b"state"), []
        for token in tail:
            names.append(digest.copy().digest())
            digest.update(array("I", [token]).tobytes())
        names.append(digest.digest())
        for length in range(len(tail), -1, -1):
            key, position = names[length], before + length
            found = self.get(key) if key in self.memory or on_disk else None
            if found is None:
                continue
            if (found[0], found[1].tail, found[1].position) != (parent, tail[:length], position):
                self.forget(key)  # a file that was not written here
            elif position < len(tokens) or whole or found[1].hidden:
                return key, found[1]
        return None

    def get(self, key: bytes) -> tuple[bytes, Checkpoint] | None:
        """A checkpoint and its parent by its name, from memory or from disk."""
        found = self.memory.get(key)
        if found is not None or self.disk is None:
            return found
        record = self.disk.read("state", key)
        decoded = decode_checkpoint(record) if record is not None else None
        if decoded is None:
            self.disk.remove("state", key)
            return None
        self.keep(*decoded)
        return decoded

    def forget(self, key: bytes) -> None:
        """Drop a checkpoint, in memory and on disk."""
        found = self.memory.pop(key)
        if found is not None:
            self._count_down(found[0])
        if self.disk is not None:
            self.disk.remove("state", key)

    def clear(self) -> None:
        """Forget those in memory."""
        self.memory.clear()
        self._parents.clear()

    def _count_down(self, parent: bytes) -> None:
        self._parents[parent] -= 1
        if not self._parents[parent]:
            del self._parents[parent]


class Openings:
    """The tokens of recent sequences: where prompts part from one another, a checkpoint pays."""

    def __init__(self) -> None:
        self._recent: list[np.ndarray] = []

    def add(self, tokens: Sequence[int]) -> None:
        """Compare later prompts with this sequence, instead of with what it continues."""
        new = np.array(array("I", tokens), np.uint32)
        others = [old for old in self._recent if not np.array_equal(old, new[: len(old)])]
        self._recent = [*others, new][-RECENT:]

    def shared(self, tokens: Sequence[int], start: int) -> int:
        """Where `tokens` part from the most similar sequence, 0 if that is not far from `start`."""
        whole = np.array(array("I", tokens), np.uint32)
        longest = 0
        for other in self._recent:
            size = min(len(other), len(whole))
            differs = np.flatnonzero(whole[:size] != other[:size])
            longest = max(longest, int(differs[0]) if len(differs) else size)
        return longest if max(MIN_SHARED, start + 1) <= longest < len(whole) else 0

    def clear(self) -> None:
        """Forget all of them."""
        self._recent.clear()


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

"""Per-sequence state of fixed size: sliding windows and the tails that no entry holds yet.

Everything lies in rings indexed by position, with room for as many tokens as a step may compute of
one sequence at once, drafts among them: taking rejected tokens back is nothing but a smaller
length. HCA keeps its running softmax after each of the last tokens instead of up to 127 raw rows.

A checkpoint is the part of a slot that the next token needs: 4.1 MB for V4-Flash.

Paper: §3.5.1 (state cache); §3.5.2 (checkpoints of the sliding window on disk).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fathom.engine.kv_cache import SlabLayout, read_ranges, write_ranges
from fathom.errors import CacheFull
from fathom.model.config import CSA_RATIO, HCA_RATIO

DRAFT_ROOM = 8  # tokens that may be taken back


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlaces:
    """Byte offsets of one layer's rings within a slot; -1 where it has none."""

    ratio: int
    window_data: int
    window_scales: int
    tail_kv: int = -1
    tail_gate: int = -1
    key_tail_kv: int = -1
    key_tail_gate: int = -1
    online: int = -1


@dataclass(frozen=True)
class SlotLayout:
    """Where everything lies in a slot. `drafting` adds the MTP block's window; `room` is how many
    tokens rings hold beyond what the next one looks at.
    """

    slabs: SlabLayout
    drafting: bool = False
    room: int = DRAFT_ROOM

    @cached_property
    def ring(self) -> int:
        """Raw entries in a window's ring."""
        return self.slabs.config.sliding_window + self.room

    @cached_property
    def tail(self) -> int:
        """Rows in a CSA tail's ring: two windows of 4 and the room."""
        return 2 * CSA_RATIO + self.room

    @cached_property
    def online(self) -> int:
        """Running softmax states in an HCA ring."""
        return 1 + self.room

    @cached_property
    def ratios(self) -> tuple[int, ...]:
        """Of the layers with a state: the main ones, then the MTP blocks when drafting."""
        config = self.slabs.config
        extra = (0,) * config.num_mtp_layers if self.drafting else ()
        return (*config.compress_ratios, *extra)

    @cached_property
    def layers(self) -> tuple[StatePlaces, ...]:
        """The rings of every layer of `ratios`."""
        return self._plan[0]

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self._plan[1]

    @cached_property
    def _plan(self) -> tuple[tuple[StatePlaces, ...], int]:
        config, end = self.slabs.config, 0

        def place(size: int) -> int:
            nonlocal end
            start, end = end, end + -(-size // 8) * 8
            return start

        places = []
        for ratio in self.ratios:
            data, scales = (place(self.ring * size) for size in self.slabs.kv_sizes)
            rows = 4 * self.tail * 2
            more: dict[str, int] = {}
            if ratio == CSA_RATIO:
                more = {
                    "tail_kv": place(rows * config.head_dim),
                    "tail_gate": place(rows * config.head_dim),
                    "key_tail_kv": place(rows * config.index_head_dim),
                    "key_tail_gate": place(rows * config.index_head_dim),
                }
            elif ratio == HCA_RATIO:
                more = {"online": place(4 * self.online * 3 * config.head_dim)}
            places.append(StatePlaces(ratio=ratio, window_data=data, window_scales=scales, **more))
        return tuple(places), end

    def checkpoint_ranges(self, length: int) -> list[tuple[int, int]]:
        """The byte ranges of a slot that the token after `length` tokens needs, in a fixed order.

        The last sliding_window - 1 raw entries; of CSA tails the last complete window and what
        follows it; of HCA the newest running softmax, unless a window has just ended.
        """
        config = self.slabs.config
        ranges: list[tuple[int, int]] = []

        def rows(start: int, size: int, ring: int, first: int) -> None:
            for p in range(max(0, first), length):
                at = start + (p % ring) * size
                if ranges and ranges[-1][1] == at:
                    ranges[-1] = (ranges[-1][0], at + size)
                else:
                    ranges.append((at, at + size))

        for p in self.layers:
            near = length - config.sliding_window + 1
            rows(p.window_data, self.slabs.kv_sizes[0], self.ring, near)
            if self.slabs.kv_sizes[1]:
                rows(p.window_scales, self.slabs.kv_sizes[1], self.ring, near)
            if p.ratio == CSA_RATIO:
                old = length - length % CSA_RATIO - CSA_RATIO
                for start, dim in (
                    (p.tail_kv, config.head_dim),
                    (p.tail_gate, config.head_dim),
                    (p.key_tail_kv, config.index_head_dim),
                    (p.key_tail_gate, config.index_head_dim),
                ):
                    rows(start, 8 * dim, self.tail, old)
            elif p.ratio == HCA_RATIO and length % HCA_RATIO:
                rows(p.online, 12 * config.head_dim, self.online, length - 1)
        return ranges

    def checkpoint_bytes(self, length: int) -> int:
        """Bytes of a checkpoint after `length` tokens."""
        return sum(b - a for a, b in self.checkpoint_ranges(length))

    def replay_tokens(self) -> int:
        """How many tokens before a point rebuild its windows exactly, from entries alone."""
        config = self.slabs.config
        return config.num_hidden_layers * (config.sliding_window - 1) + config.sliding_window


class SlotPool:
    """All slots of a device: one allocation at a fixed address. data: [slots, slot_bytes] uint8."""

    def __init__(self, layout: SlotLayout, count: int, device: torch.device | str = "cpu") -> None:
        self.layout, self.count = layout, count
        self.data = torch.zeros(count, layout.slot_bytes, dtype=torch.uint8, device=device)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    def take(self) -> int:
        """A free slot. Raises CacheFull when there is none."""
        if not self._free:
            raise CacheFull(f"all {self.count} sequence slots are in use")
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free
        self._free.append(slot)

    def read(self, slot: int, length: int) -> bytes:
        """The checkpoint record of a sequence of `length` tokens."""
        return read_ranges(self.data[slot], self.layout.checkpoint_ranges(length))

    def write(self, slot: int, record: bytes, length: int) -> None:
        """Undo `read`. Raises ValueError when the record has another length."""
        write_ranges(self.data[slot], self.layout.checkpoint_ranges(length), record)

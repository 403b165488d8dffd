"""The memory of resident adapters: rows of one layout, stacked, one slot each.

A slot is written in place: MLX copies nothing if nobody else holds the array, so no view of a stack may be
kept. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from .layout import GroupLayout, Layout
from .routing import ResidentAdapter

__all__ = ["Shelf", "Stack"]


class Stack:
    """One group's rows of several adapters: `slab` (slots, layout.size)."""

    def __init__(self, layout: GroupLayout) -> None:
        self.layout = layout
        self.slab = mx.zeros((0, layout.size), dtype=layout.dtype)

    def a(self) -> mx.array:
        """Every slot's A, (slots, rank, in); a view."""
        layout = self.layout
        return self.slab[:, : layout.rank * layout.in_size].reshape(-1, layout.rank, layout.in_size)

    def b(self, path: str) -> mx.array:
        """Every slot's B of one projection, (slots, rank, out); a view."""
        ranks = self.layout.ranks[path]
        return self.slab[:, self.layout.b[path]].reshape(self.slab.shape[0], ranks.stop - ranks.start, -1)

    def factor(self, path: str) -> mx.array:
        """Every slot's DoRA factor of one projection, (slots, out); a view."""
        return self.slab[:, self.layout.factors[path]]

    def write(self, slot: int, row: mx.array) -> None:
        """Put `row` (layout.size,) into a slot; evaluated by whoever calls."""
        self.slab[slot] = row

    def grow(self, by: int) -> None:
        """Add empty slots at the end."""
        self.slab = mx.concatenate([self.slab, mx.zeros((by, self.layout.size), dtype=self.layout.dtype)])
        mx.eval(self.slab)

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all but `slots`, which are numbered anew in this order."""
        self.slab = self.slab[mx.array(list(slots), dtype=mx.uint32)]
        mx.eval(self.slab)


class Shelf:
    """The stacks of one layout, and which adapter has which slot: the same one in every stack."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.stacks = {name: Stack(group) for name, group in layout.groups.items()}
        self.slots: dict[ResidentAdapter, int] = {}
        self._capacity = 0

    @property
    def size_bytes(self) -> int:
        """What the stacks take, empty slots included."""
        return sum(stack.slab.nbytes for stack in self.stacks.values())

    def put(self, adapter: ResidentAdapter, rows: Mapping[str, mx.array]) -> int:
        """Write the rows of `adapter`, by group, into an empty slot; returns its number."""
        slot = min(set(range(self._capacity)).difference(self.slots.values()), default=self._capacity)
        if slot == self._capacity:
            by = max(1, slot // 16)
            # One after the other, so that only one stack is there twice at a time.
            for stack in self.stacks.values():
                stack.grow(by)
            self._capacity += by
        for name, stack in self.stacks.items():
            stack.write(slot, rows[name])
        mx.eval([stack.slab for stack in self.stacks.values()])
        self.slots[adapter] = slot
        return slot

    def drop(self, adapter: ResidentAdapter) -> bool:
        """Empty the slot of `adapter`. Returns whether the others were numbered anew.

        Empty slots are kept for the next adapters, up to the share that growing leaves.
        """
        del self.slots[adapter]
        used = len(self.slots)
        if self._capacity <= used + 1 + used // 16 and used:
            return False
        keep = list(self.slots.values())
        for stack in self.stacks.values():
            stack.keep(keep)
        self.slots = {kept: slot for slot, kept in enumerate(self.slots)}
        self._capacity = used
        return True

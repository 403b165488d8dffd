"""The memory of resident adapters: rows of one layout, stacked, one slot each.

A slot is written in place: MLX copies nothing if nobody else holds the array. So nobody but the stack keeps a
view of it, and the stack lets go of them before it writes. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from .layout import GroupLayout, Layout
from .residents import ResidentAdapter

__all__ = ["Shelf", "Stack"]


class Stack:
    """One group's rows of several adapters: `slab` (slots, layout.size).

    Views are not to be kept beyond a forward. `fits` says whether CUDA's kernels compute it, by input type.
    """

    def __init__(self, layout: GroupLayout) -> None:
        self.layout = layout
        self.slab = mx.zeros((0, layout.size), dtype=layout.dtype)
        self.fits: dict[mx.Dtype, bool] = {}
        self._views: dict[tuple[str, int | None], mx.array] = {}

    def a(self, slot: int | None = None) -> mx.array:
        """Every slot's A, (slots, rank, in); with `slot`, that one's alone, (rank, in).

        Here and in `b`, experts' are (slots, experts, rank, …) and (experts, rank, …).
        """
        return self._view("", slot, lambda: self.layout.a, self.layout.rank)

    def b(self, path: str, slot: int | None = None) -> mx.array:
        """Every slot's B of one projection, (slots, rank, out); with `slot`, that one's, (rank, out)."""
        ranks = self.layout.ranks[path]
        return self._view(path, slot, lambda: self.layout.b[path], ranks.stop - ranks.start)

    def factor(self, path: str) -> mx.array:
        """Every slot's DoRA factor of one projection, (slots, out)."""
        return self.slab[:, self.layout.factors[path]]

    def bias(self, path: str) -> mx.array:
        """Every slot's own bias for one projection, (slots, out)."""
        return self.slab[:, self.layout.biases[path]]

    def write(self, slot: int, row: mx.array) -> None:
        """Put `row` (layout.size,) into a slot; evaluated by whoever calls."""
        self._views.clear()
        self.slab[slot] = row

    def grow(self, slots: int) -> None:
        """Have at least `slots` slots; the new ones, at the end, are empty."""
        missing = slots - self.slab.shape[0]
        if missing > 0:
            empty = mx.zeros((missing, self.layout.size), dtype=self.layout.dtype)
            self.replace(mx.concatenate([self.slab, empty]))

    def replace(self, slab: mx.array) -> None:
        """Take another slab, which is evaluated here."""
        mx.eval(slab)
        self._views.clear()
        self.slab = slab

    def _view(self, name: str, slot: int | None, place: Callable[[], slice], rank: int) -> mx.array:
        """Matrices of `rank` rows that lie at `place` in each row of the slab, or in one; made once."""
        view = self._views.get((name, slot))
        if view is None:
            # An integer as index would copy.
            slots = slice(None) if slot is None else slice(slot, slot + 1)
            shape = [-1] if slot is None else []
            shape += [rank] if self.layout.experts is None else [self.layout.experts, rank]
            part = self.slab[slots, place()]
            size = part.shape[1] // (rank * self.layout.matrices)
            view = self._views[name, slot] = part.reshape(*shape, size)
        return view


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
            # One after the other, so that only one stack is there twice at a time.
            for stack in self.stacks.values():
                stack.grow(slot + max(1, slot // 16))
            self._capacity = slot + max(1, slot // 16)
        for name, stack in self.stacks.items():
            stack.write(slot, rows[name])
        mx.eval([stack.slab for stack in self.stacks.values()])
        self.slots[adapter] = slot
        return slot

    def rows_of(self, adapter: ResidentAdapter) -> dict[str, mx.array]:
        """Copies of the rows of `adapter`, by group, evaluated."""
        slot = self.slots[adapter]
        rows = {name: stack.slab[slot] for name, stack in self.stacks.items()}  # an integer as index copies
        mx.eval(rows)
        return rows

    def drop(self, adapter: ResidentAdapter) -> bool:
        """Empty the slot of `adapter`. Returns whether the others were numbered anew.

        Empty slots are kept for the next adapters, up to the share that growing leaves.
        """
        del self.slots[adapter]
        used = len(self.slots)
        if self._capacity <= used + 1 + used // 16 and used:
            return False
        keep = mx.array(list(self.slots.values()), dtype=mx.uint32)
        # All before any: adapters whose stacks disagree about their slots would compute nonsense.
        kept = {name: stack.slab[keep] for name, stack in self.stacks.items()}
        try:
            mx.eval(kept)
        except RuntimeError:
            return False  # no memory for a second copy, which is no reason to fail: the slots stay empty
        for name, stack in self.stacks.items():
            stack.replace(kept[name])
        self.slots = {one: slot for slot, one in enumerate(self.slots)}
        self._capacity = used
        return True

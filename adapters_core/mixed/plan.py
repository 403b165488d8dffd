"""The rows of one batch, laid out once for the layers of all its forwards: which stack serves which rows.

Knows slots and weights, not what a layer computes with them. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import ContainerStateError
from .layout import Layout
from .residents import ResidentAdapter, RowAdapters

__all__ = ["BatchPlan", "Pass", "Placement"]

_T = TypeVar("_T")


class Placement(NamedTuple):
    """Where a bank keeps an adapter: its slot in every stack of a layout, and what is left of its scale."""

    layout: Layout
    slot: int
    scale: float


class Pass:
    """Rows of a batch that the stacks of one layout serve in one go, each row at most once.

    `rows` (E,) uint32 are their positions in the batch, or None when they are all of it in order. `slots`
    (E,) uint32 say where the stacks keep each one's factors; `slot` is the number where all rows of the batch
    have the same. `select` (B,) uint32 rebuilds the batch from [all B old rows, then the E new ones].
    `is_weighted` says whether any row's scale times request weight is not 1. `entries` are
    (row, slot, weight).
    """

    def __init__(self, layout: Layout, entries: Sequence[tuple[int, int, float]], batch_size: int) -> None:
        self.layout = layout
        self.entries = tuple(entries)
        self._batch_size = batch_size
        self._weights: dict[mx.Dtype, mx.array] = {}
        rows = [row for row, _, _ in entries]
        slots = {slot for _, slot, _ in entries}
        everywhere = rows == list(range(batch_size))
        self.is_weighted = any(factor != 1.0 for _, _, factor in entries)
        self.slots = mx.array([slot for _, slot, _ in entries], dtype=mx.uint32)
        self.slot = slots.pop() if everywhere and len(slots) == 1 else None
        self.rows: mx.array | None = None
        self.select: mx.array | None = None
        if not everywhere:
            self.rows = mx.array(rows, dtype=mx.uint32)
            position = {row: batch_size + at for at, row in enumerate(rows)}
            self.select = mx.array([position.get(row, row) for row in range(batch_size)], dtype=mx.uint32)

    def of(self, batch: mx.array) -> mx.array:
        """The rows concerned, (E, …), of what all rows of the batch have, (B, …)."""
        return batch if self.rows is None else batch[self.rows]

    def replaced(self, batch: mx.array, new: mx.array) -> mx.array:
        """`batch` (B, …) with `new` (E, …) for the rows concerned; the others keep their bits."""
        return new if self.select is None else mx.take(mx.concatenate([batch, new]), self.select, axis=0)

    def weighted(self, z: mx.array) -> mx.array:
        """z (E, …, …) of the rows concerned times their weights, in float32."""
        return z * self.weights(mx.float32)

    def weights(self, dtype: mx.Dtype) -> mx.array:
        """Scale times request weight of each row, (E, 1, 1)."""
        found = self._weights.get(dtype)
        if found is None:
            factors = mx.array([factor for _, _, factor in self.entries], dtype=mx.float32)
            found = self._weights[dtype] = factors.reshape(-1, 1, 1).astype(dtype)
        return found

    @property
    def slot_numbers(self) -> list[int]:
        """The slot of each row concerned."""
        return [slot for _, slot, _ in self.entries]

    @cached_property
    def packed(self) -> mx.array:
        """(B, 2) int32 for experts: each row's slot, -1 where there is none, and the bits of its weight."""
        packed = np.full((self._batch_size, 2), -1, dtype=np.int32)
        for row, slot, factor in self.entries:
            packed[row] = slot, np.float32(factor).view(np.int32)
        return mx.array(packed)


class BatchPlan:
    """The rows of one batch, laid out once and used by every layer of every forward until they change.

    `memo` is for what layers of one forward share; it is emptied when the forward ends. `length` is how many
    tokens of each row the forward under way reads. `all_adapted` says whether every row has an adapter.
    """

    def __init__(self, rows: Sequence[RowAdapters], placements: Mapping[ResidentAdapter, Placement]) -> None:
        self.batch_size = len(rows)
        self.all_adapted = all(rows)
        self.length: int | None = None
        self.memo: dict[Any, Any] = {}
        self._work: dict[Any, Any] = {}
        # The n-th term of a row that falls into a layout goes to the layout's n-th pass.
        entries: dict[tuple[Layout, int], list[tuple[int, int, float]]] = {}
        for row, terms in enumerate(rows):
            used: Counter[Layout] = Counter()
            for adapter, weight in terms:
                if adapter not in placements:
                    raise ContainerStateError(f"a row computes with {adapter.digest}, which is not resident")
                layout, slot, scale = placements[adapter]
                entries.setdefault((layout, used[layout]), []).append((row, slot, scale * weight))
                used[layout] += 1
        self.passes = tuple(Pass(layout, found, self.batch_size) for (layout, _), found in entries.items())

    def is_flat(self, count: int) -> bool:
        """Whether `count` vectors in a row are those of all tokens of this forward, row after row."""
        return self.length is not None and count == self.batch_size * self.length

    def work(self, owner: Any, make: Callable[[BatchPlan], _T]) -> _T:
        """What `make` gives for this plan and `owner`; made once."""
        work = self._work.get(owner)
        if work is None:
            work = self._work[owner] = make(self)
        return work

"""Which adapters each row of a forward computes with, and the model that is told so.

A batch generator moves KV caches about (merges, splits, filters them) and never says which row is
which request. So each request carries one more entry at the end of its cache list, AdapterRows, which
is moved like the rest; RoutedModel takes it off again and lays the rows out as a BatchPlan for the
adapted layers of that forward. Knows slots and weights, not what a layer computes with them. Runs on
the thread that owns the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..errors import BlendError, ContainerStateError
from ..report import LoadReport
from .kernel import Kernels, on_cuda
from .layout import Layout

__all__ = [
    "AdapterRows",
    "BatchPlan",
    "Pass",
    "Placement",
    "ResidentAdapter",
    "RoutedModel",
    "Routing",
    "RowAdapters",
    "make_row",
    "row_key",
]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, slots=True)
class ResidentAdapter:
    """An adapter whose weights lie in a bank. Compared by identity: two loads are two residents.

    `rank` and `scale` are the largest where modules differ; `size_bytes` is what its own tensors take in
    the bank. `report` says more of it.
    """

    digest: str
    type: str
    rank: int
    scale: float
    paths: tuple[str, ...]
    size_bytes: int
    format: str = "mlx"
    report: LoadReport | None = None

    @property
    def modules(self) -> int:
        """How many modules it adapts."""
        return len(self.paths)


RowAdapters = tuple[tuple[ResidentAdapter, float], ...]
"""What one row adds to the base: (adapter, weight) terms whose deltas are summed. Empty: the base alone."""


def make_row(terms: Iterable[tuple[ResidentAdapter, float]]) -> RowAdapters:
    """The row that computes with `terms`, in an order that depends on the contents alone.

    Weights of one adapter named twice add up; a weight of 0 drops out.

    Raises:
        BlendError: a weight is not finite, or a DoRA adapter is weighted or blended: its magnitudes
            rescale the base, so its effect is not a sum (arXiv:2402.09353).
    """
    weights: dict[ResidentAdapter, float] = {}
    for adapter, weight in terms:
        if not math.isfinite(weight):
            raise BlendError(f"a weight must be a finite number, got {weight}")
        weights[adapter] = weights.get(adapter, 0.0) + weight
    if any(adapter.type == "dora" for adapter in weights):
        if len(weights) > 1:
            raise BlendError("a DoRA adapter cannot be blended with others: its effect is not linear")
        if set(weights.values()) != {1.0}:
            raise BlendError("a DoRA adapter can only be used at weight 1: its effect is not linear")
    kept = [(adapter, weight) for adapter, weight in weights.items() if weight != 0.0]
    return tuple(sorted(kept, key=lambda term: (term[0].digest, term[1])))


def row_key(row: RowAdapters) -> tuple[tuple[str, float], ...]:
    """What `row` computes with, by content: equal keys mean equal KV caches over the same base."""
    return tuple((adapter.digest, weight) for adapter, weight in row)


class Pass:
    """Rows of a batch that the stacks of one layout serve in one go, each row at most once.

    `rows` (E,) uint32 are their positions in the batch, or None when they are all of it in order. `slots`
    (E,) uint32 say where the stacks keep each one's factors; `slot` is the number where all rows of the batch
    have the same. `select` (B,) uint32 rebuilds the batch from [all B old rows, then the E new ones].
    `is_weighted` says whether any row's scale times request weight is not 1.
    """

    def __init__(self, layout: Layout, entries: Sequence[tuple[int, int, float]], batch_size: int) -> None:
        self.layout = layout
        self._entries = entries
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

    def weights(self, dtype: mx.Dtype) -> mx.array:
        """Scale times request weight of each row, (E, 1, 1)."""
        found = self._weights.get(dtype)
        if found is None:
            factors = mx.array([factor for _, _, factor in self._entries], dtype=mx.float32)
            found = self._weights[dtype] = factors.reshape(-1, 1, 1).astype(dtype)
        return found

    @property
    def slot_numbers(self) -> list[int]:
        """The slot of each row concerned."""
        return [slot for _, slot, _ in self._entries]

    @cached_property
    def packed(self) -> mx.array:
        """(B, 2) int32 for a kernel: each row's slot, -1 where there is none, and the bits of its weight."""
        packed = np.full((self._batch_size, 2), -1, dtype=np.int32)
        for row, slot, factor in self._entries:
            packed[row] = slot, np.float32(factor).view(np.int32)
        return mx.array(packed)


class BatchPlan:
    """The rows of one batch, laid out once and used by every layer of every forward until they change.

    `memo` is for what layers of one forward share; it is emptied when the forward ends. `length` is how many
    tokens of each row the forward under way reads.
    """

    def __init__(self, rows: Sequence[RowAdapters], placements: Mapping[ResidentAdapter, Placement]) -> None:
        self.batch_size = len(rows)
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


class Placement(NamedTuple):
    """Where a bank keeps an adapter: its slot in every stack of a layout, and what is left of its scale."""

    layout: Layout
    slot: int
    scale: float


class Routing:
    """The plan of the forward under way, and where the bank keeps its adapters; shared by the layers.

    `generation` counts the times that adapters have changed their slots: an older plan points at wrong ones.
    On a CUDA GPU, `kernels` are the fused ones; with None in their place, all is computed without.
    """

    def __init__(self) -> None:
        self.on_cuda = on_cuda()
        self.kernels = Kernels() if self.on_cuda else None
        self.plan: BatchPlan | None = None
        self.placements: dict[ResidentAdapter, Placement] = {}
        self.generation = 0


class AdapterRows:
    """The adapters of each row of a batch, in the guise of one more KV cache of mlx-lm.

    Follows the cache protocol of `mlx_lm.models.cache`, so that a batch generator moves it with the KV
    rows. It holds no arrays and no positions; what it holds is shared, never copied.
    """

    def __init__(self, rows: Sequence[RowAdapters]) -> None:
        self.rows: tuple[RowAdapters, ...] = tuple(rows)
        self._plan: BatchPlan | None = None
        self._generation = -1

    def plan(self, routing: Routing) -> BatchPlan | None:
        """How these rows are laid out; None if no row uses an adapter.

        Raises:
            ContainerStateError: a row uses an adapter that is not resident.
        """
        if not any(self.rows):
            return None
        if self._plan is None or self._generation != routing.generation:
            self._plan = BatchPlan(self.rows, routing.placements)
            self._generation = routing.generation
        return self._plan

    def _set(self, rows: tuple[RowAdapters, ...]) -> None:
        if rows != self.rows:
            self.rows = rows
            self._plan = None

    @classmethod
    def merge(cls, caches: Sequence[AdapterRows]) -> Self:
        """One entry for the rows of all `caches`, in their order."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: AdapterRows) -> None:
        """Append the rows of `other`."""
        self._set(self.rows + other.rows)

    def filter(self, batch_indices: Iterable[int] | mx.array) -> None:
        """Keep the rows at `batch_indices`, in that order."""
        self._set(tuple(self.rows[int(index)] for index in batch_indices))

    def extract(self, index: int) -> AdapterRows:
        """The entry of one row alone."""
        return AdapterRows([self.rows[index]])

    def prepare(self, **_: Any) -> None:
        """Padding concerns positions; there are none here."""

    def finalize(self) -> None:
        """Padding concerns positions; there are none here."""

    @property
    def state(self) -> list[mx.array]:
        """No arrays: nothing to evaluate or save."""
        return []

    @property
    def nbytes(self) -> int:
        """No arrays: no bytes."""
        return 0

    def is_trimmable(self) -> bool:
        """Trimming tokens leaves the rows as they are."""
        return True

    def trim(self, n: int) -> int:
        """Trimming tokens leaves the rows as they are."""
        return n

    def size(self) -> int:
        """No tokens are held here."""
        return 0

    def empty(self) -> bool:
        """Whether there are no rows."""
        return not self.rows

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterRows:
        return AdapterRows(self.rows)


class RoutedModel:
    """A model whose every call says, by the last entry of its cache, what each row computes with."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.model = model
        self._routing = routing

    def __call__(self, inputs: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits (B, L, vocabulary) of `inputs` (B, L), as the model itself computes them.

        Raises:
            TypeError: the cache does not end in AdapterRows, or speaks of another number of rows.
        """
        *kv_caches, rows = cache
        if not isinstance(rows, AdapterRows) or len(rows.rows) != inputs.shape[0]:
            raise TypeError(f"the cache must end in AdapterRows for {inputs.shape[0]} row(s), got {rows!r}")
        plan = self._routing.plan = rows.plan(self._routing)
        if plan is not None:
            plan.length = inputs.shape[1]
        try:
            return self.model(inputs, cache=kv_caches)
        finally:
            self._routing.plan = None
            if plan is not None:
                plan.memo.clear()

    def new_cache(self, row: RowAdapters) -> list[Any]:
        """An empty prompt cache for one request that computes with `row`."""
        return self.with_row(make_prompt_cache(self.model), row)

    @staticmethod
    def with_row(kv_caches: Sequence[Any], row: RowAdapters) -> list[Any]:
        """A prompt cache for one request: its KV caches, then what it computes with."""
        return [*kv_caches, AdapterRows([row])]

    @staticmethod
    def strip(cache: Sequence[Any]) -> list[Any]:
        """The KV caches alone, as they are kept for later requests."""
        return [entry for entry in cache if not isinstance(entry, AdapterRows)]

"""Which adapters each row of a forward computes with, and the model that is told so.

A batch generator moves KV caches about (merges, splits, filters them) and never says which row is
which request. So each request carries one more entry at the end of its cache list, AdapterRows, which
is moved like the rest; RoutedModel takes it off again and lays the rows out as a BatchPlan for the
adapted layers of that forward. Knows slots and weights, not what a layer computes with them. Runs on
the thread that owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .errors import BlendError

__all__ = [
    "AdapterRows",
    "BatchPlan",
    "Placement",
    "ResidentAdapter",
    "RoutedModel",
    "Routing",
    "RowAdapters",
    "RowGroup",
    "StackKey",
    "make_row",
    "row_key",
]


@dataclass(frozen=True, eq=False, slots=True)
class ResidentAdapter:
    """An adapter whose weights lie in a bank. Compared by identity: two loads are two residents.

    `rank` and `scale` are the largest where modules differ; `size_bytes` is what its own tensors take in
    the bank.
    """

    digest: str
    type: str
    rank: int
    scale: float
    paths: tuple[str, ...]
    size_bytes: int

    @property
    def modules(self) -> int:
        """How many linear layers it adapts."""
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


class StackKey(NamedTuple):
    """Adapters of one layer that can share a stack: same form, same padded rank, same dtype."""

    type: str
    rank: int
    dtype: mx.Dtype


class Placement(NamedTuple):
    """Where a layer keeps a resident's factors, and the scale of their product."""

    key: StackKey
    slot: int
    scale: float


class AdaptedLayer(Protocol):
    """What a plan needs of a layer that serves mixed rows."""

    def placement(self, adapter: ResidentAdapter) -> Placement | None:
        """Where the layer keeps `adapter`, or None if the adapter does not touch it."""
        ...


class RowGroup:
    """Rows of a batch that one stack serves in one go, each row at most once.

    `rows` (E,) uint32 are their positions in the batch, or None when they are all of it in order.
    `slots` (E,) uint32 say where the stack keeps each one's factors. `select` (B,) uint32 rebuilds the
    batch from [all B old rows, then the E new ones].
    """

    __slots__ = ("_factors", "_weights", "key", "rows", "select", "slots")

    def __init__(self, key: StackKey, entries: Sequence[tuple[int, int, float]], batch_size: int) -> None:
        rows = [row for row, _, _ in entries]
        self.key = key
        self.slots = mx.array([slot for _, slot, _ in entries], dtype=mx.uint32)
        self._factors = [factor for _, _, factor in entries]
        self._weights: mx.array | None = None
        self.rows: mx.array | None = None
        self.select: mx.array | None = None
        if rows != list(range(batch_size)):
            self.rows = mx.array(rows, dtype=mx.uint32)
            position = {row: batch_size + at for at, row in enumerate(rows)}
            self.select = mx.array([position.get(row, row) for row in range(batch_size)], dtype=mx.uint32)

    @property
    def weights(self) -> mx.array:
        """Scale times request weight of each row, (E, 1, 1), in the stack's dtype."""
        if self._weights is None:
            self._weights = mx.array(self._factors, dtype=mx.float32).reshape(-1, 1, 1).astype(self.key.dtype)
        return self._weights


class BatchPlan:
    """The rows of one batch, laid out once and used by every layer of every forward until they change.

    Layers that keep the batch's adapters in the same places share their index arrays, so that laying out
    a batch costs a few look-ups a layer.
    """

    def __init__(self, rows: Sequence[RowAdapters]) -> None:
        self.batch_size = len(rows)
        self._rows = rows
        self._residents = tuple(dict.fromkeys(adapter for row in rows for adapter, _ in row))
        self._groups: dict[tuple[Placement | None, ...], tuple[RowGroup, ...]] = {}

    def groups(self, layer: AdaptedLayer) -> tuple[RowGroup, ...]:
        """The groups of rows that `layer` adapts; empty when the batch's adapters do not touch it."""
        places = tuple(layer.placement(adapter) for adapter in self._residents)
        groups = self._groups.get(places)
        if groups is None:
            groups = self._groups[places] = self._lay_out(places)
        return groups

    def _lay_out(self, places: tuple[Placement | None, ...]) -> tuple[RowGroup, ...]:
        where = dict(zip(self._residents, places, strict=True))
        # The n-th term of a row that falls into a stack goes to the stack's n-th group.
        entries: dict[tuple[StackKey, int], list[tuple[int, int, float]]] = {}
        for row, terms in enumerate(self._rows):
            used: dict[StackKey, int] = {}
            for adapter, weight in terms:
                place = where[adapter]
                if place is None:
                    continue
                nth = used[place.key] = used.get(place.key, -1) + 1
                entries.setdefault((place.key, nth), []).append((row, place.slot, place.scale * weight))
        return tuple(RowGroup(key, group, self.batch_size) for (key, _), group in entries.items())


class Routing:
    """The plan of the forward under way, shared by the adapted layers of one model.

    `generation` counts changes of the bank: a plan laid out before a change may point at old slots.
    """

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
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

    def plan(self, generation: int) -> BatchPlan | None:
        """The layout of these rows for a bank at `generation`; None if no row uses an adapter."""
        if not any(self.rows):
            return None
        if self._plan is None or self._generation != generation:
            self._plan = BatchPlan(self.rows)
            self._generation = generation
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
        self._routing.plan = rows.plan(self._routing.generation)
        try:
            return self.model(inputs, cache=kv_caches)
        finally:
            self._routing.plan = None

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

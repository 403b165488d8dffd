"""Which adapters each row of a forward computes with, and the model that is told so.

A batch generator moves KV caches about (merges, splits, filters them) and never says which row is
which request. So each request carries one more entry at the end of its cache list, AdapterRows, which
is moved like the rest; RoutedModel takes it off again and lays the rows out as a BatchPlan for the
adapted layers of that forward. Runs on the thread that owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .forms import Forms, forms_of
from .kernel import Kernels, on_cuda
from .plan import BatchPlan, Placement
from .residents import ResidentAdapter, RowAdapters

__all__ = [
    "AdapterRows",
    "HighestLogits",
    "RoutedModel",
    "Routing",
    "RowWatch",
]


class Routing:
    """The plan of the forward under way, and where the bank keeps its adapters; shared by the layers.

    `generation` counts the times that adapters have changed their slots: an older plan points at wrong ones.
    On a CUDA GPU, `kernels` are the fused ones; with None in their place, all is computed without. `forms`
    say how the rest is computed. Both are set between two forwards only.
    """

    def __init__(self, forms: Forms | None = None) -> None:
        """`forms` None are the device's defaults."""
        self.on_cuda = on_cuda()
        self.kernels = Kernels() if self.on_cuda else None
        self.forms = forms or Forms.all(forms_of(on_cuda=self.on_cuda)[0])
        self.plan: BatchPlan | None = None
        self.placements: dict[ResidentAdapter, Placement] = {}
        self.generation = 0


class HighestLogits:
    """The highest of the last logits of each row of one forward, as (B,) in `lazy`.

    It is finite exactly where no logit is NaN (then the maximum is too), none is +inf, and not all are
    -inf, which rules single tokens out.
    """

    def __init__(self, logits: mx.array) -> None:
        self.lazy = mx.max(logits[:, -1, :], axis=-1)

    @cached_property
    def finite(self) -> list[bool]:
        """Whether it is, for each row; evaluates."""
        return [math.isfinite(value) for value in cast("list[float]", self.lazy.tolist())]


class RowWatch:
    """The last two forwards of one row that read one token each.

    A batch generator starts a forward before it tells the token that the one before it made, so that what is
    asked for with a token is `before`, and what is to be evaluated with the forward under way is `last`.
    """

    def __init__(self) -> None:
        self._before: tuple[HighestLogits, int] | None = None
        self._last: tuple[HighestLogits, int] | None = None

    @property
    def last(self) -> HighestLogits | None:
        """Of the last forward."""
        return None if self._last is None else self._last[0]

    @property
    def was_finite(self) -> bool:
        """Whether the row's logits were, in the forward before the last."""
        return self._before is None or self._before[0].finite[self._before[1]]

    def note(self, highest: HighestLogits, row: int) -> None:
        """There was one more forward, in which this was row number `row`."""
        self._before, self._last = self._last, (highest, row)


class AdapterRows:
    """The adapters of each row of a batch, in the guise of one more KV cache of mlx-lm.

    Follows the cache protocol of `mlx_lm.models.cache`, so that a batch generator moves it with the KV
    rows. It holds no arrays and no positions; what it holds is shared, never copied. `watches` hear of each
    forward's logits; None for rows that nobody watches.
    """

    def __init__(self, rows: Sequence[RowAdapters], watches: Sequence[RowWatch | None] = ()) -> None:
        self.rows: tuple[RowAdapters, ...] = tuple(rows)
        self.watches = tuple(watches) or (None,) * len(self.rows)
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

    def note(self, logits: mx.array) -> None:
        """Tell those who watch of the logits (B, L, vocabulary) of these rows."""
        if any(self.watches):
            highest = HighestLogits(logits)
            for row, watch in enumerate(self.watches):
                if watch is not None:
                    watch.note(highest, row)

    def _set(self, rows: tuple[RowAdapters, ...], watches: tuple[RowWatch | None, ...]) -> None:
        self.watches = watches
        if rows != self.rows:
            self.rows = rows
            self._plan = None

    @classmethod
    def merge(cls, caches: Sequence[AdapterRows]) -> Self:
        """One entry for the rows of all `caches`, in their order."""
        rows = [row for cache in caches for row in cache.rows]
        return cls(rows, [watch for cache in caches for watch in cache.watches])

    def extend(self, other: AdapterRows) -> None:
        """Append the rows of `other`."""
        self._set(self.rows + other.rows, self.watches + other.watches)

    def filter(self, batch_indices: Iterable[int] | mx.array) -> None:
        """Keep the rows at `batch_indices`, in that order."""
        kept = [int(index) for index in batch_indices]
        self._set(tuple(self.rows[at] for at in kept), tuple(self.watches[at] for at in kept))

    def extract(self, index: int) -> AdapterRows:
        """The entry of one row alone."""
        return AdapterRows([self.rows[index]], [self.watches[index]])

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
        return AdapterRows(self.rows, self.watches)


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
            logits = self.model(inputs, cache=kv_caches)
        finally:
            self._routing.plan = None
            if plan is not None:
                plan.memo.clear()
        if inputs.shape[1] == 1:
            rows.note(logits)
        return logits

    def new_cache(self, row: RowAdapters, watch: RowWatch | None = None) -> list[Any]:
        """An empty prompt cache for one request that computes with `row`."""
        return self.with_row(make_prompt_cache(self.model), row, watch)

    @staticmethod
    def with_row(kv_caches: Sequence[Any], row: RowAdapters, watch: RowWatch | None = None) -> list[Any]:
        """A prompt cache for one request: its KV caches, then what it computes with, and who watches it."""
        return [*kv_caches, AdapterRows([row], [watch])]

    @staticmethod
    def strip(cache: Sequence[Any]) -> list[Any]:
        """The KV caches alone, as they are kept for later requests."""
        return [entry for entry in cache if not isinstance(entry, AdapterRows)]

"""Adapters that lie in a bank, and rows: what one request computes with. Pure; runs on any thread."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import BlendError
from ..report import LoadReport

__all__ = ["ResidentAdapter", "RowAdapters", "make_row", "row_key"]


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

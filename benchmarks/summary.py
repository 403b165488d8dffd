"""What is said of several values of one quantity. Pure; standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

__all__ = ["Spread", "Statistic", "percentile", "spread"]


class Statistic(StrEnum):
    """One number for many."""

    MEDIAN = "median"
    P95 = "p95"
    P99 = "p99"
    LARGEST = "largest"

    def of(self, values: Sequence[float]) -> float:
        """Raises: ValueError without values."""
        if not values:
            raise ValueError(f"expected at least one value to take the {self} of, got none")
        return _BY_NAME[self](values)


@dataclass(frozen=True, slots=True)
class Spread:
    """Several values of one quantity, in the order in which they were measured."""

    median: float
    lowest: float
    highest: float
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Raises: ValueError without values."""
    if not values:
        raise ValueError("expected at least one value, got none")
    return Spread(median(values), min(values), max(values), tuple(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed (the nearest-rank method)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


_BY_NAME: Mapping[Statistic, Callable[[Sequence[float]], float]] = {
    Statistic.MEDIAN: median,
    Statistic.P95: lambda values: percentile(values, 95),
    Statistic.P99: lambda values: percentile(values, 99),
    Statistic.LARGEST: max,
}

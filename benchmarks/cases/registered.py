"""Throughput by the number of registered adapters, with memory for the same few: Zipf's law throughout."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases.zipf import COLUMNS, paged
from benchmarks.sizes import Sizes

__all__ = ["case"]

_COUNTS = (8, 64, 256)


def case(sizes: Sizes) -> Case:
    """8, 64 and 256 adapters, and as many as the run has."""
    counts = [count for count in _COUNTS if count < sizes.registered] + [sizes.registered]
    return Case(
        name="registered",
        about=f"Throughput by the number of registered adapters, with memory for {sizes.resident}.",
        measures=tuple(paged(sizes, count) for count in counts),
        columns=COLUMNS,
    )

"""Throughput by the number of distinct adapters in one batch: 32 requests over none, 1, 8 and 32."""

from __future__ import annotations

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case
from benchmarks.library import AdapterSet
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["case"]

_COUNTS = (0, 1, 8, 32)


def case(sizes: Sizes) -> Case:
    """Twice as many requests as usual, of which each adapter gets as many."""
    requests = 2 * sizes.requests
    side = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, max(_COUNTS)),))
    measures = tuple(
        LoadMeasure(side, requests, sizes.max_tokens, adapters=count, series=series)
        for series, count in enumerate(_COUNTS)
        if count <= requests
    )
    return Case(
        name="distinct",
        about=f"Throughput of {requests} requests by the number of distinct adapters among them.",
        measures=measures,
    )

"""Throughput by the number of requests at once: on the base, over adapters, and on mlx_lm.server's base."""

from __future__ import annotations

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case
from benchmarks.library import AdapterSet
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["case"]

_COUNTS = (1, 4, 16, 32)


def case(sizes: Sizes) -> Case:
    """1, 4, 16 and 32 requests; over as many adapters as there are, or as requests."""
    ours = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, sizes.adapters),))
    theirs = SideSpec(SideKind.MLX_LM)
    measures = []
    for series, requests in enumerate(_COUNTS):
        base = LoadMeasure(ours, requests, sizes.max_tokens, series=series)
        mixed = LoadMeasure(
            ours, requests, sizes.max_tokens, adapters=min(requests, sizes.adapters), series=series
        )
        measures += [base, mixed, LoadMeasure(theirs, requests, sizes.max_tokens, series=series)]
    return Case(
        name="concurrency",
        about="Base and mixed throughput by the number of requests at once, with mlx_lm.server on the base.",
        measures=tuple(measures),
    )

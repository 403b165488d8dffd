"""Times to the first token and between tokens under a steady load: base, mixed, and mlx_lm.server's base."""

from __future__ import annotations

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Column
from benchmarks.library import AdapterSet
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["case"]


def case(sizes: Sizes) -> Case:
    """As many requests in flight as usual, the next as soon as one ends."""
    ours = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, sizes.adapters),))
    base, mixed, theirs = (
        LoadMeasure(side, sizes.closed_loop_requests, sizes.max_tokens, adapters, in_flight=sizes.requests)
        for side, adapters in ((ours, 0), (ours, sizes.adapters), (SideSpec(SideKind.MLX_LM), 0))
    )
    columns = [
        Column(f"{heading} {statistic}, ms", quantity, statistic, 1000, 0)
        for heading, quantity in (("first token", "first_token_seconds"), ("between tokens", "gap_seconds"))
        for statistic in (Statistic.MEDIAN, Statistic.P95, Statistic.P99)
    ]
    return Case(
        name="latency",
        about="Times to the first token and between tokens, base and mixed, with mlx_lm.server on the base.",
        measures=(base, mixed, theirs),
        columns=tuple(columns),
    )

"""mlx_lm.server on the same loads: what serving adapters in one batch is worth."""

from __future__ import annotations

from benchmarks.case import Case, Figure, Goal, Term
from benchmarks.cases.adapters import STAGE, base, mixed
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind
from benchmarks.sizes import Sizes

__all__ = ["case"]


def case(sizes: Sizes) -> Case:
    """Base, some adapters, and as many adapters as requests."""
    pairs = [
        (base(sizes), base(sizes, SideKind.MLX_LM)),
        (mixed(sizes), mixed(sizes, SideKind.MLX_LM)),
        (mixed(sizes, many=True), mixed(sizes, SideKind.MLX_LM, many=True)),
    ]
    over = f"{sizes.requests} requests over"
    return Case(
        name="peer",
        about="mlx-graft against mlx_lm.server on the same loads.",
        measures=tuple(measure for pair in pairs for measure in pair),
        figures=(
            _figure("base only, against mlx_lm.server", pairs[0], 1.1),
            _figure(f"{over} {sizes.adapters} adapters, against mlx_lm.server", pairs[1], 7),
            _figure(f"{over} {sizes.many_adapters} adapters, against mlx_lm.server", pairs[2], 12),
        ),
        stage=STAGE,
        round_seconds=175,
    )


def _figure(label: str, pair: tuple[LoadMeasure, LoadMeasure], bound: float) -> Figure:
    ours, theirs = (Term(measure, "tokens_per_second") for measure in pair)
    return Figure(label, ours, theirs, Goal(bound, at_least=True))

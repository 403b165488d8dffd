"""mlx_lm.server on the same loads on the base, by the number of requests at once."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.case import Case, Figure, Goal, Measure, Term
from benchmarks.cases.adapters import STAGE, base
from benchmarks.sides import SideKind
from benchmarks.sizes import Sizes

__all__ = ["case"]

_FEW_REQUESTS = 4  # on a CPU, where so few leave nothing to win


def case(sizes: Sizes) -> Case:
    """Throughput, and on a GPU the first token."""
    measures: list[Measure] = []
    figures: list[Figure] = []
    for index, requests in enumerate(dict.fromkeys((*sizes.peer_requests, sizes.requests))):
        # The load that the stage's other cases have keeps its questions.
        series = 0 if requests == sizes.requests else 2 + index
        ours, theirs = (
            replace(base(sizes, kind), requests=requests, series=series)
            for kind in (SideKind.GRAFT, SideKind.MLX_LM)
        )
        measures += [ours, theirs]
        bound = 1.0 if requests <= _FEW_REQUESTS and not sizes.on_gpu else 1.1
        what = f"{requests} request{'s' * (requests > 1)} on the base, against mlx_lm.server"
        terms = Term(ours, "tokens_per_second"), Term(theirs, "tokens_per_second")
        figures.append(Figure(f"{what}, tokens/s", *terms, Goal(bound, at_least=True)))
        first = Term(ours, "first_token_seconds"), Term(theirs, "first_token_seconds")
        goal = Goal(1.0, at_least=False) if sizes.on_gpu else None
        figures.append(Figure(f"{what}, median first token", *first, goal))
    return Case(
        name="peer",
        about="mlx-graft against mlx_lm.server on the base, by the number of requests at once.",
        measures=tuple(measures),
        figures=tuple(figures),
        stage=STAGE,
        round_seconds=40,
    )

"""mlx_lm.server over several adapters on the same load: what serving them in one batch is worth.

It holds one adapter at a time, so each switch loads the model anew: with a large model, that is all it does.
"""

from __future__ import annotations

from benchmarks.case import Case, Figure, Goal, Term
from benchmarks.cases.adapters import STAGE, mixed
from benchmarks.sides import SideKind
from benchmarks.sizes import Sizes

__all__ = ["case"]


def case(sizes: Sizes) -> Case:
    """Some adapters, and as many adapters as requests."""
    pairs = [
        (mixed(sizes, many=many), mixed(sizes, SideKind.MLX_LM, many=many), bound)
        for many, bound in ((False, 7), (True, 12))
    ]
    return Case(
        name="switching",
        about="mlx-graft against mlx_lm.server on requests over several adapters.",
        measures=tuple(measure for ours, theirs, _ in pairs for measure in (ours, theirs)),
        figures=tuple(
            Figure(
                f"{sizes.requests} requests over {ours.adapters} adapters, against mlx_lm.server",
                Term(ours, "tokens_per_second"),
                Term(theirs, "tokens_per_second"),
                Goal(bound, at_least=True),
            )
            for ours, theirs, bound in pairs
        ),
        stage=STAGE,
        round_seconds=160,
    )

"""The whole server against mlx-lm's bare BatchGenerator: what HTTP and the engine cost.

The same prompts, as many tokens, all in one batch, and neither keeps what it has read. The generator has
mlx-lm's own settings for reading prompts.
"""

from __future__ import annotations

from benchmarks.case import Case, Figure, Goal, Term
from benchmarks.cases.adapters import STAGE, base
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["case"]


def case(sizes: Sizes) -> Case:
    """Tokens in, tokens out, against messages in, events out."""
    ours = base(sizes)
    bare = LoadMeasure(SideSpec(SideKind.BARE), sizes.requests, sizes.max_tokens)
    return Case(
        name="overhead",
        about="The engine and HTTP against a bare BatchGenerator doing the same work.",
        measures=(ours, bare),
        figures=(
            Figure(
                "engine and HTTP against a bare BatchGenerator",
                Term(ours, "tokens_per_second"),
                Term(bare, "tokens_per_second"),
                Goal(0.97, at_least=True),
            ),
        ),
        stage=STAGE,
        round_seconds=10,
    )

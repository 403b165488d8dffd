"""The engine's loop against a bare generator, both with nothing around them, and the server against the loop.

All on the base, with the same prompts at the same times. What is compared is how prompts are read and rows
are decoded together; the last figure says what HTTP, threads and text add.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.case import FIRST_TOKEN, GAP, RATE, Case, Column, Figure, Goal, Term
from benchmarks.loads import PassageLoad
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["case"]

_LENGTHS = {(30, 90): 1.2, (400, 600): 1.1}
_STAGGERED = (200, 800)


def case(sizes: Sizes) -> Case:
    """Short and long prompts at once, prompts that come one after the other, and short ones over HTTP."""
    bare, loop = SideSpec(SideKind.BARE), SideSpec(SideKind.LOOP)
    answers = (sizes.max_tokens, sizes.max_tokens)
    measures: list[PassageLoad] = []
    figures: list[Figure] = []
    rate, first, gap = "tokens_per_second", "first_token_seconds", "gap_seconds"
    for series, (lengths, latest) in enumerate(_LENGTHS.items(), start=2):
        theirs = PassageLoad(bare, sizes.requests, lengths, answers, series=series)
        ours = replace(theirs, side=loop)
        what = f"{sizes.requests} at once, prompts {lengths[0]}-{lengths[1]}, loop ÷ bare generator"
        measures += [theirs, ours]
        figures += [
            Figure(f"{what}, tokens/s", Term(ours, rate), Term(theirs, rate), Goal(0.95, at_least=True)),
            Figure(
                f"{what}, median first token",
                Term(ours, first),
                Term(theirs, first),
                Goal(latest, at_least=False),
            ),
        ]
    over_http = replace(measures[0], side=SideSpec(SideKind.GRAFT, options=("--prompt-cache-bytes", "0")))
    every = sizes.staggered_milliseconds / 1000
    theirs = PassageLoad(bare, sizes.staggered_requests, _STAGGERED, answers, every_seconds=every, series=4)
    ours = replace(theirs, side=loop)
    what = (
        f"{sizes.staggered_requests} requests every {sizes.staggered_milliseconds} ms, loop ÷ bare generator"
    )
    ends = Statistic.P99
    return Case(
        name="loop",
        about="The engine's loop against a bare generator, and the server against the loop, on the base.",
        measures=(*measures, over_http, theirs, ours),
        figures=(
            *figures,
            Figure(
                f"{sizes.requests} at once, prompts 30-90, HTTP ÷ loop, tokens/s",
                Term(over_http, rate),
                Term(measures[1], rate),
                Goal(0.95, at_least=True),
            ),
            Figure(f"{what}, tokens/s", Term(ours, rate), Term(theirs, rate), Goal(0.95, at_least=True)),
            Figure(
                f"{what}, median first token",
                Term(ours, first),
                Term(theirs, first),
                Goal(1.1, at_least=False),
            ),
            Figure(
                f"{what}, p99 gap", Term(ours, gap, ends), Term(theirs, gap, ends), Goal(1.0, at_least=False)
            ),
        ),
        columns=(
            RATE,
            FIRST_TOKEN,
            Column("p99, ms", first, ends, 1000, 0),
            GAP,
            Column("p99, ms", gap, ends, 1000, 0),
        ),
        round_seconds=120,
    )

"""A second request that begins as the first did: what is left of the time to its first token.

The shared beginning is a system message of the wanted number of tokens, new in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.cases.first_token import STAGE, server
from benchmarks.prompts import passages, story
from benchmarks.sides import Question, Side, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["Prefix", "case"]

_FIRST_NUMBER = 900_000  # beyond those of other questions


@dataclass(frozen=True, slots=True)
class Prefix:
    """Two requests to the base, one after the other, with `tokens` tokens in common at the beginning."""

    side: SideSpec
    tokens: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is asked."""
        return f"{self.side}, base, {self.tokens} tokens in common, idle server"

    async def prepare(self, side: Side) -> None:
        """Nothing: every round has a beginning of its own."""

    async def run(self, side: Side, round_index: int) -> Sample:
        """The second request differs in the question after the passage."""
        (system,) = passages(side.context.model_path, _FIRST_NUMBER + round_index, [self.tokens])
        answers = []
        for number in (0, 1):
            answers += (await side.ask([Question(system, story(number), 2)])).answers
        first, second = answers
        notes = ()
        if second.cached_tokens < 0.9 * self.tokens:
            notes = (f"the second request reused {second.cached_tokens} of {self.tokens} tokens",)
        return Sample(
            {
                "new_seconds": (first.first_token_seconds,),
                "reused_seconds": (second.first_token_seconds,),
                "cached_tokens": (float(second.cached_tokens),),
                "prompt_tokens": (float(second.prompt_tokens),),
            },
            notes=notes,
        )


def case(sizes: Sizes) -> Case:
    """One pair of requests each round."""
    measure = Prefix(server(sizes), sizes.prefix_tokens)
    return Case(
        name="prefix",
        about="The first token of a second request with the same long beginning, against the first's.",
        measures=(measure,),
        figures=(
            Figure(
                f"second request with the same {sizes.prefix_tokens}-token prefix, first token ÷ the first's",
                Term(measure, "reused_seconds"),
                Term(measure, "new_seconds"),
                Goal(0.15, at_least=False),
            ),
        ),
        columns=(
            Column("first request, ms", "new_seconds", factor=1000, digits=0),
            Column("second, ms", "reused_seconds", factor=1000, digits=0),
            Column("its prompt tokens", "prompt_tokens", digits=0),
            Column("of them cached", "cached_tokens", digits=0),
        ),
        stage=STAGE,
        round_seconds=7,
    )

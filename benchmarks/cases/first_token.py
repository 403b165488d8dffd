"""The first token of an adapter's first request, against that of the base.

The adapter is resident and no batch has used it yet; every sample takes another one. The server is idle,
and no prompt has a beginning in common with an earlier one, on the base neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import FIRST_TOKEN, Case, Column, Figure, Goal, Sample, Term
from benchmarks.library import AdapterSet, adapter_id
from benchmarks.loads import stories
from benchmarks.sides import Question, Side, SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["STAGE", "FirstTokens", "case", "server"]

STAGE = "single"
_ROUNDS_OF_FRESH_ADAPTERS = 8
_KIND = RANK_8_QV


def server(sizes: Sizes) -> SideSpec:
    """The server of the stage: enough adapters for all of its cases."""
    fresh = max(_ROUNDS_OF_FRESH_ADAPTERS * sizes.first_token_samples, sizes.loads)
    return SideSpec(SideKind.GRAFT, (AdapterSet(_KIND, sizes.streams + fresh),))


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """`samples` requests one after the other, each to another adapter just loaded, or to the base.

    The side's first `others` adapters are left alone.
    """

    side: SideSpec
    samples: int
    others: int
    fresh_adapters: bool
    asked: None = None

    @property
    def name(self) -> str:
        """What is asked."""
        return f"{self.side}, {'an adapter never used' if self.fresh_adapters else 'base'}, idle server"

    async def prepare(self, side: Side) -> None:
        """One request; every later one is the first of its kind again."""
        await replace(self, samples=1).run(side, 0)

    async def run(self, side: Side, round_index: int) -> Sample:
        """Adapters are unloaded at the end; those of much later rounds come again, loaded anew."""
        questions = stories(round_index, self.samples, 2, series=2 if self.fresh_adapters else 3)
        seconds = []
        for index, question in enumerate(questions):
            if not self.fresh_adapters:
                seconds.append(await _first_token(side, question))
                continue
            number = round_index % _ROUNDS_OF_FRESH_ADAPTERS * self.samples + index
            name = adapter_id(_KIND, self.others + number)
            await side.load(name)
            seconds.append(await _first_token(side, replace(question, adapter=name)))
            await side.unload(name)
        return Sample({"first_token_seconds": tuple(seconds)})


def case(sizes: Sizes) -> Case:
    """Medians of the samples of each round."""
    fresh = FirstTokens(server(sizes), sizes.first_token_samples, sizes.streams, fresh_adapters=True)
    base = replace(fresh, fresh_adapters=False)
    return Case(
        name="first-token",
        about="The first token on a resident adapter that was never used, against the base's.",
        measures=(base, fresh),
        figures=(
            Figure(
                "first token on a resident adapter never used ÷ on the base",
                Term(fresh, "first_token_seconds"),
                Term(base, "first_token_seconds"),
                Goal(1.1, at_least=False),
            ),
        ),
        columns=(FIRST_TOKEN, Column("p95, ms", "first_token_seconds", Statistic.P95, 1000, 0)),
        stage=STAGE,
        round_seconds=13,
    )


async def _first_token(side: Side, question: Question) -> float:
    (answer,) = (await side.ask([question])).answers
    return answer.first_token_seconds

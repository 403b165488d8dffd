"""How long running streams stand still while the first adapter of a new kind arrives, and how long it waits.

Every round has a kind of its own, and the server finds nothing that was compiled before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.adapters import ALL, ATTENTION, QV, RANK_8_QV, AdapterKind
from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.cases.stalls import while_streaming
from benchmarks.library import AdapterSet, adapter_id
from benchmarks.loads import deal, stories
from benchmarks.sides import Side, SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["NewKind", "case"]

_KINDS = (
    AdapterKind(32, ALL),
    AdapterKind(16, ATTENTION, dora=True),
    AdapterKind(4, QV),
    AdapterKind(24, ALL, dora=True),
    AdapterKind(12, ATTENTION),
    AdapterKind(64, QV),
    AdapterKind(2, ALL),
)


@dataclass(frozen=True, slots=True)
class NewKind:
    """A request for an adapter of a kind that is new, while `streams` streams of `tokens` tokens run."""

    side: SideSpec
    streams: int
    tokens: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is done."""
        return f"{self.side}, {self.streams} streams, a request for an adapter of a new kind"

    async def prepare(self, side: Side) -> None:
        """The adapters that stream."""
        names = [adapter_id(RANK_8_QV, index) for index in range(self.streams)]
        await side.ask(deal(stories(0, self.streams, 4, series=6), names))

    async def run(self, side: Side, round_index: int) -> Sample:
        """Rounds beyond the kinds there are take one again, and say so."""
        kind = _KINDS[(round_index - 1) % len(_KINDS)]
        question = replace(stories(round_index, 1, 8, series=7)[0], adapter=adapter_id(kind, 0))
        first_seconds: list[float] = []

        async def ask() -> None:
            first_seconds.extend(one.first_token_seconds for one in (await side.ask([question])).answers)

        sample = await while_streaming(side, round_index, self.streams, self.tokens, ask)
        again = (f"{kind} was not new",) if round_index > len(_KINDS) else ()
        values = {**sample.values, "first_token_seconds": tuple(first_seconds)}
        return replace(sample, values=values, notes=(*sample.notes, *again))


def case(sizes: Sizes) -> Case:
    """The worst gap of each round, in seconds."""
    sets = (AdapterSet(RANK_8_QV, sizes.streams), *(AdapterSet(kind, 1) for kind in _KINDS))
    measure = NewKind(SideSpec(SideKind.GRAFT, sets, fresh_cache=True), sizes.streams, sizes.stream_tokens)
    return Case(
        name="new-kind",
        about="Running streams while the first adapter of a new kind arrives, with nothing compiled before.",
        measures=(measure,),
        figures=(
            Figure(
                "worst gap in running streams while an adapter of a new kind arrives",
                Term(measure, "busy_gap_seconds", Statistic.LARGEST),
                goal=Goal(1, at_least=False),
                unit=" s",
            ),
            Figure("first token of that adapter", Term(measure, "first_token_seconds"), unit=" s"),
        ),
        columns=(
            Column("median gap before, ms", "quiet_gap_seconds", Statistic.MEDIAN, 1000, 0),
            Column("worst gap during, ms", "busy_gap_seconds", Statistic.LARGEST, 1000, 0),
            Column("first token, ms", "first_token_seconds", Statistic.MEDIAN, 1000, 0),
            Column("its largest, ms", "first_token_seconds", Statistic.LARGEST, 1000, 0),
        ),
        round_seconds=12,
    )

"""How long running streams stand still while adapters are loaded.

All loads are asked for at once, as many requests for cold adapters would ask for them. The gaps of the very
same streams before the loads are what the worst one is held against.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.cases.first_token import STAGE, server
from benchmarks.library import adapter_id
from benchmarks.load import LoadResult
from benchmarks.loads import deal, stories
from benchmarks.sides import Side, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["Stalls", "case", "while_streaming"]

_KIND = RANK_8_QV
_QUIET_TOKENS = 10  # of each stream, before the loads begin


@dataclass(frozen=True, slots=True)
class Stalls:
    """`streams` streams of `tokens` tokens, each of another adapter, while `loads` others are loaded."""

    side: SideSpec
    streams: int
    tokens: int
    loads: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is done."""
        return f"{self.side}, {self.streams} streams, {self.loads} adapters loaded at once"

    async def prepare(self, side: Side) -> None:
        """The adapters that stream, loaded."""
        questions = stories(0, self.streams, 1, series=4)
        await side.ask(deal(questions, [adapter_id(_KIND, index) for index in range(self.streams)]))

    async def run(self, side: Side, round_index: int) -> Sample:
        """The loaded adapters are unloaded at the end."""
        names = [adapter_id(_KIND, self.streams + index) for index in range(self.loads)]

        async def load_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for name in names:
                        group.create_task(side.load(name))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

        sample = await while_streaming(side, round_index, self.streams, self.tokens, load_all)
        for name in names:
            await side.unload(name)
        return sample


async def while_streaming(
    side: Side, round_index: int, streams: int, tokens: int, act: Callable[[], Awaitable[None]]
) -> Sample:
    """Run `act` while the first adapters stream, one stream each, and tell the gaps before from those during.

    Raises: ProcessError; ValueError if the streams were too short to tell.
    """
    questions = deal(
        stories(round_index, streams, tokens, series=4),
        [adapter_id(_KIND, index) for index in range(streams)],
    )
    flowing = asyncio.Event()
    pieces: Counter[int] = Counter()

    def heard(index: int) -> None:
        pieces[index] += 1
        if len(pieces) == streams and min(pieces.values()) >= _QUIET_TOKENS:
            flowing.set()

    async def streaming() -> LoadResult:
        try:
            return await side.ask(questions, heard=heard)
        finally:
            flowing.set()

    task = asyncio.create_task(streaming())
    try:
        await flowing.wait()
        begun = time.perf_counter()
        await act()
        ended = time.perf_counter()
        result = await task
    finally:
        task.cancel()
    return _gaps(result, begun - result.origin_seconds, ended - result.origin_seconds)


def _gaps(result: LoadResult, begun: float, ended: float) -> Sample:
    """Gaps that touch the time from `begun` to `ended`, and those between the last stream's start and it."""
    flowing = max(answer.text_seconds[0] for answer in result.answers if answer.text_seconds)
    gaps = [pair for answer in result.answers for pair in pairwise(answer.text_seconds)]
    quiet = tuple(later - earlier for earlier, later in gaps if flowing <= earlier and later <= begun)
    during = tuple(later - earlier for earlier, later in gaps if later > begun and earlier < ended)
    if not quiet or not during:
        raise ValueError(
            f"expected streams that run before and while something is done, got {len(quiet)} gaps before and "
            f"{len(during)} during it: let them have more tokens"
        )
    last = min(answer.ended_seconds for answer in result.answers)
    notes = ("a stream ended before all was done: what came after has no gaps",) if last < ended else ()
    return Sample(
        {"quiet_gap_seconds": quiet, "busy_gap_seconds": during, "acting_seconds": (ended - begun,)},
        notes=notes,
    )


def case(sizes: Sizes) -> Case:
    """The worst gap of each round."""
    measure = Stalls(server(sizes), sizes.streams, sizes.stream_tokens, sizes.loads)
    return Case(
        name="stalls",
        about="The worst gap between tokens of running streams while adapters are loaded.",
        measures=(measure,),
        figures=(
            Figure(
                f"worst gap between tokens while {sizes.loads} adapters load ÷ median gap without",
                Term(measure, "busy_gap_seconds", Statistic.LARGEST),
                Term(measure, "quiet_gap_seconds"),
                Goal(3, at_least=False),
            ),
        ),
        columns=(
            Column("median gap before, ms", "quiet_gap_seconds", Statistic.MEDIAN, 1000, 0),
            Column("median gap during, ms", "busy_gap_seconds", Statistic.MEDIAN, 1000, 0),
            Column("worst during, ms", "busy_gap_seconds", Statistic.LARGEST, 1000, 0),
            Column("all loads, ms", "acting_seconds", Statistic.MEDIAN, 1000, 0),
        ),
        stage=STAGE,
        round_seconds=11,
    )

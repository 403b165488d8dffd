"""What bringing another adapter into use takes: cold loads, loads under traffic, swaps, a request's wait.

For mlx_lm.server only the last can be measured: it takes an adapter's path in a request.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Column, Sample
from benchmarks.cases.stalls import while_streaming
from benchmarks.library import AdapterSet, adapter_id
from benchmarks.loads import stories
from benchmarks.sides import Side, SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["Loading", "Way", "case"]

_KIND = RANK_8_QV


class Way(StrEnum):
    """What is timed."""

    COLD_LOAD = "cold load, idle server"
    BUSY_LOAD = "load under traffic, one after the other"
    SWAP = "swap of the active adapter, both resident"
    OTHER = "first token of a request for another adapter than the last"
    SAME = "first token of a request for the same adapter as the last"


@dataclass(frozen=True, slots=True)
class Loading:
    """`samples` times of one way: requests and streams are to the first adapters, loads are of the others."""

    side: SideSpec
    way: Way
    samples: int
    streams: int
    stream_tokens: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is timed."""
        return f"{self.side}, {self.way}"

    async def prepare(self, side: Side) -> None:
        """One round."""
        await self.run(side, 0)

    async def run(self, side: Side, round_index: int) -> Sample:
        """What is loaded is unloaded at the end, where the side can do so."""
        names = [adapter_id(_KIND, self.streams + index) for index in range(self.samples)]
        if self.way in (Way.OTHER, Way.SAME):
            return await self._requests(side, round_index)
        if self.way is Way.SWAP:
            return await self._swaps(side, names[:2])
        seconds: list[float] = []

        async def load_all() -> None:
            for name in names:
                seconds.append(await _timed(lambda name=name: side.load(name)))

        values: dict[str, tuple[float, ...]] = {}
        if self.way is Way.BUSY_LOAD:
            streamed = await while_streaming(side, round_index, self.streams, self.stream_tokens, load_all)
            values.update(streamed.values)
        else:
            await load_all()
        for name in names:
            await side.unload(name)
        return Sample({**values, "seconds": tuple(seconds)})

    async def _swaps(self, side: Side, names: list[str]) -> Sample:
        for name in names:
            await side.load(name)
        seconds, inside = [], []
        for index in range(self.samples):
            start = time.perf_counter()
            report = await side.activate(names[index % len(names)])
            seconds.append(time.perf_counter() - start)
            inside.append(float(report["swap_seconds"]))
        await side.activate(None)
        for name in names:
            await side.unload(name)
        return Sample({"seconds": tuple(seconds), "swap_seconds": tuple(inside)})

    async def _requests(self, side: Side, round_index: int) -> Sample:
        """The first request for each adapter is not counted: it may have to load it."""
        names = [adapter_id(_KIND, index) for index in range(2 if self.way is Way.OTHER else 1)]
        series = 6 if self.way is Way.OTHER else 7
        seconds = []
        for index, question in enumerate(stories(round_index, self.samples + len(names), 2, series)):
            asked = replace(question, adapter=names[index % len(names)])
            (answer,) = (await side.ask([asked])).answers
            seconds.append(answer.first_token_seconds)
        return Sample({"seconds": tuple(seconds[len(names) :])})


def case(sizes: Sizes) -> Case:
    """All ways on mlx-graft, the requests on mlx_lm.server too."""
    adapters = (AdapterSet(_KIND, sizes.streams + sizes.first_token_samples),)
    ours, theirs = SideSpec(SideKind.GRAFT, adapters), SideSpec(SideKind.MLX_LM, adapters)
    measures = [(ours, way) for way in Way] + [(theirs, way) for way in (Way.OTHER, Way.SAME)]
    return Case(
        name="loading",
        about="Cold loads, loads under traffic, swaps, and what a request waits for another adapter.",
        measures=tuple(
            Loading(side, way, sizes.first_token_samples, sizes.streams, sizes.stream_tokens)
            for side, way in measures
        ),
        columns=(
            Column("ms", "seconds", factor=1000),
            Column("p95, ms", "seconds", Statistic.P95, 1000),
            Column("in the server, ms", "swap_seconds", factor=1000, digits=3),
            Column("worst gap of streams, ms", "busy_gap_seconds", Statistic.LARGEST, 1000, 0),
            Column("median gap before, ms", "quiet_gap_seconds", factor=1000, digits=0),
        ),
    )


async def _timed(act: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await act()
    return time.perf_counter() - start

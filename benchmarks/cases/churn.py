"""Whether loading and unloading leaves memory behind: the process' size over many cycles."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.cases.memory import STAGE, server
from benchmarks.sides import Side, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["Churn", "case"]

_ADAPTERS = 4
_READINGS = 20


@dataclass(frozen=True, slots=True)
class Churn:
    """`cycles` loads and unloads, over a few adapters in turn, after a warm-up of as many."""

    side: SideSpec
    cycles: int
    warm_up_cycles: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is done."""
        return f"{self.side}, {self.cycles} loads and unloads after {self.warm_up_cycles}"

    async def prepare(self, side: Side) -> None:
        """The warm-up."""
        await self._cycle(side, self.warm_up_cycles)

    async def run(self, side: Side, round_index: int) -> Sample:
        """Reads the process' size at the start and then at even distances to the end."""
        sizes = [await side.process_bytes()]
        seconds: list[float] = []
        done = 0
        for reading in range(1, _READINGS + 1):
            until = self.cycles * reading // _READINGS
            seconds += await self._cycle(side, until - done)
            done = until
            sizes.append(await side.process_bytes())
        return Sample(
            {
                "process_bytes": tuple(map(float, sizes)),
                "growth_percent": (100 * (sizes[-1] / sizes[0] - 1),),
                "cycle_seconds": tuple(seconds),
            }
        )

    async def _cycle(self, side: Side, count: int) -> list[float]:
        names = self.side.adapters[0].ids[:_ADAPTERS]
        seconds = []
        for index in range(count):
            start = time.perf_counter()
            await side.load(names[index % len(names)])
            await side.unload(names[index % len(names)])
            seconds.append(time.perf_counter() - start)
        return seconds


def case(sizes: Sizes) -> Case:
    """One round: it is long, and later ones would begin where it ended."""
    measure = Churn(server(sizes), sizes.cycles, sizes.warm_up_cycles)
    return Case(
        name="churn",
        about="Growth of the process over many loads and unloads.",
        measures=(measure,),
        figures=(
            Figure(
                f"growth of the process over {sizes.cycles:,} load/unload cycles",
                Term(measure, "growth_percent"),
                goal=Goal(2, at_least=False),
                unit="%",
            ),
        ),
        columns=(
            Column("largest process, MB", "process_bytes", Statistic.LARGEST, 1e-6, 0),
            Column("load and unload, ms", "cycle_seconds", factor=1000),
            Column("p99, ms", "cycle_seconds", Statistic.P99, 1000),
        ),
        stage=STAGE,
        rounds=1,
        round_seconds=57,
    )

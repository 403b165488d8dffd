"""How fast the server is beside processes that keep a processor each busy.

They are started for a measure and ended after it. Alone, the server is also held against itself with as many
BLAS threads as there are processors, whatever others do.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Hashable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from benchmarks.case import RATE, Case, Column, Figure, Goal, Sample, Term
from benchmarks.loads import sample_of, stories
from benchmarks.processes import child_process
from benchmarks.sides import Side, SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["Beside", "case"]

_SPIN = "print('busy', flush=True)\nwhile True: pass"
_SETTLE_SECONDS = 4  # longer than the server takes to notice that processors are free
_GOALS = {1: 0.6, 2: 0.45, 4: 0.3}


@dataclass(frozen=True, slots=True)
class Beside:
    """One answer of `tokens` tokens of the base, beside `busy` busy processes."""

    side: SideSpec
    busy: int
    tokens: int

    @property
    def name(self) -> str:
        """What is done."""
        return f"{self.side}, beside {self.busy} busy processes"

    @property
    def asked(self) -> Hashable:
        """The same of all."""
        return self.tokens

    async def prepare(self, side: Side) -> None:
        """A short answer, which compiles what has to be."""
        await side.ask(stories(0, 1, 2))

    async def run(self, side: Side, round_index: int) -> Sample:
        """Start the processes, let all settle, ask, and end them."""
        async with AsyncExitStack() as stack:
            for index in range(self.busy):
                name = f"busy process {index + 1}"
                log = side.context.log_folder / f"busy-{index + 1}.log"
                spin = child_process(
                    name, [sys.executable, "-c", _SPIN], log, cwd=log.parent, environment=os.environ
                )
                await stack.enter_async_context(spin)
            await asyncio.sleep(_SETTLE_SECONDS)
            return sample_of(await side.ask(stories(round_index, 1, self.tokens)))


def case(sizes: Sizes) -> Case:
    """The rate beside one, two and four busy processes, by that alone in the same round."""
    ours = SideSpec(SideKind.GRAFT)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = (("OPENBLAS_NUM_THREADS", str(processors)),)
    fixed = SideSpec(SideKind.GRAFT, environment=threads, instance="with fixed threads")
    alone, *beside = (Beside(ours, busy, sizes.max_tokens) for busy in (0, *_GOALS))
    before = Beside(fixed, 0, sizes.max_tokens)
    rates = [
        Figure(
            f"tokens/s beside {measure.busy} busy process{'es' * (measure.busy > 1)} ÷ alone",
            Term(measure, "tokens_per_second"),
            Term(alone, "tokens_per_second"),
            Goal(_GOALS[measure.busy], at_least=True),
        )
        for measure in beside
    ]
    same = Figure(
        "tokens/s alone ÷ with fixed BLAS threads, alone",
        Term(alone, "tokens_per_second"),
        Term(before, "tokens_per_second"),
        Goal(0.97, at_least=True),
    )
    return Case(
        name="busy",
        about="Tokens per second beside busy processes, which the case starts; run it on a quiet machine.",
        measures=(alone, before, *beside),
        figures=(*rates, same),
        columns=(
            RATE,
            Column("between tokens, ms", "gap_seconds", Statistic.MEDIAN, 1000, 0),
            Column("p99, ms", "gap_seconds", Statistic.P99, 1000, 0),
        ),
        round_seconds=50,
    )

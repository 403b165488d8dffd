"""Many registered adapters of which few fit into memory, against few that are all resident.

Which adapter a request names is drawn by Zipf's law (exponent 1, seeded). So many requests are in flight
at a time, and the next begins when one ends; answers differ in length. The memory is full before the first
round.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import FIRST_TOKEN, GAP, RATE, Case, Column, Figure, Goal, Sample, Term
from benchmarks.library import AdapterSet, adapter_id
from benchmarks.loads import LoadMeasure, sample_of, stories, uneven
from benchmarks.sides import Question, Side, SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["COLUMNS", "ZipfMeasure", "case", "draws", "paged"]

_KIND = RANK_8_QV
COLUMNS = (RATE, FIRST_TOKEN, GAP, Column("hits, %", "hit_percent"), Column("resident", "resident", digits=0))


def draws(registered: int, count: int, seed: int) -> list[int]:
    """`count` adapters by Zipf's law: number k, from 0, is drawn with a chance proportional to 1/(k + 1)."""
    weights = [1 / (rank + 1) for rank in range(registered)]
    return random.Random(seed).choices(range(registered), weights, k=count)


@dataclass(frozen=True, slots=True)
class ZipfMeasure:
    """`requests` requests over `registered` adapters, `in_flight` at a time."""

    side: SideSpec
    registered: int
    requests: int
    in_flight: int
    max_tokens: int
    warm_up_requests: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is asked of whom."""
        at_once = f"{self.requests} requests, {self.in_flight} at a time"
        return f"{self.side}, {self.registered} adapters, Zipf, {at_once}"

    async def prepare(self, side: Side) -> None:
        """Load the adapters that requests by the same law would leave resident, and use some of them."""
        questions = self._questions(0, self.warm_up_requests, 1)
        last = list(dict.fromkeys(question.adapter for question in reversed(questions)))
        for adapter in reversed(last[: self.side.memory_adapters]):
            if adapter is not None:
                await side.load(adapter)
        asked = [replace(each, prompt="Hello!") for each in questions[-self.in_flight :]]
        await side.ask(asked, in_flight=self.in_flight)

    async def run(self, side: Side, round_index: int) -> Sample:
        """Every adapter that comes into memory is a miss: one more is resident then, or another has left.

        Requests that come while their adapter is on its way for an earlier one wait too, but count as hits.
        """
        before = await self._came_in(side)
        questions = self._questions(round_index, self.requests, self.max_tokens)
        result = await side.ask(questions, in_flight=self.in_flight)
        misses = await self._came_in(side) - before
        sample = sample_of(result)
        more = {
            "hit_percent": (100 * (1 - misses / self.requests),),
            "resident": (await side.metric("graft_resident_adapters"),),
        }
        return replace(sample, values={**sample.values, **more})

    @staticmethod
    async def _came_in(side: Side) -> float:
        left = await side.metric("graft_adapter_evictions_total")
        return left + await side.metric("graft_resident_adapters")

    def _questions(self, round_index: int, count: int, max_tokens: int) -> Sequence[Question]:
        numbers = draws(self.registered, count, seed=round_index)
        questions = uneven(stories(round_index, count, max_tokens, series=5))
        return [
            replace(question, adapter=adapter_id(_KIND, number))
            for question, number in zip(questions, numbers, strict=True)
        ]


def paged(sizes: Sizes, registered: int) -> ZipfMeasure:
    """The load on a server with `registered` adapters, and memory for as many as are resident."""
    side = SideSpec(
        SideKind.GRAFT,
        (AdapterSet(_KIND, registered),),
        memory_adapters=sizes.resident,
        instance=f"with {registered} adapters",
    )
    requests, warm_up = sizes.closed_loop_requests, sizes.closed_loop_warm_up
    return ZipfMeasure(side, registered, requests, sizes.requests, sizes.max_tokens, warm_up)


def case(sizes: Sizes) -> Case:
    """The same questions on both."""
    many = paged(sizes, sizes.registered)
    side = SideSpec(
        SideKind.GRAFT, (AdapterSet(_KIND, sizes.adapters),), instance=f"with {sizes.adapters} adapters"
    )
    few = LoadMeasure(
        side,
        sizes.closed_loop_requests,
        sizes.max_tokens,
        adapters=sizes.adapters,
        series=5,
        in_flight=sizes.requests,
    )
    return Case(
        name="zipf",
        about="Many registered adapters, few of them resident, against few that are all resident.",
        measures=(few, many),
        figures=(
            Figure(
                f"{sizes.registered:,} adapters registered, {sizes.resident} resident, Zipf ÷ "
                f"{sizes.adapters} all resident",
                Term(many, "tokens_per_second"),
                Term(few, "tokens_per_second"),
                Goal(0.85, at_least=True),
            ),
        ),
        columns=COLUMNS,
        round_seconds=65,
    )

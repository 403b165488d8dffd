"""One popular adapter with a crowd of waiting requests, and one request for another that comes after them.

The lone request is held against its own time on an idle server; so are the crowd's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Column, Figure, Sample, Term
from benchmarks.library import AdapterSet, adapter_id
from benchmarks.load import LoadResult
from benchmarks.loads import stories
from benchmarks.sides import Question, Side, SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["Fairness", "case"]

_KIND = RANK_8_QV


@dataclass(frozen=True, slots=True)
class Fairness:
    """`crowd` requests for the first adapter, then, when the first of them speaks, one for the second."""

    side: SideSpec
    crowd: int
    max_tokens: int
    asked: None = None

    @property
    def name(self) -> str:
        """What is asked of whom."""
        return f"{self.side}, {self.crowd} requests for one adapter, 1 for another"

    async def prepare(self, side: Side) -> None:
        """Both adapters once."""
        popular, lone = self._questions(0)
        await side.ask([replace(each, max_tokens=2) for each in (popular[0], lone)])

    async def run(self, side: Side, round_index: int) -> Sample:
        """The idle server first, then the crowd."""
        popular, lone = self._questions(round_index)
        alone = replace(lone, system=f"Alone. {lone.system}")
        (idle,) = (await side.ask([alone])).answers
        speaking = asyncio.Event()

        async def crowd() -> LoadResult:
            try:
                return await side.ask(popular, heard=lambda index: speaking.set())
            finally:
                speaking.set()

        try:
            async with asyncio.TaskGroup() as group:
                crowding = group.create_task(crowd())
                await speaking.wait()
                (single,) = (await side.ask([lone])).answers
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        crowd_seconds = [answer.seconds for answer in crowding.result().answers]
        return Sample(
            {
                "idle_seconds": (idle.seconds,),
                "single_seconds": (single.seconds,),
                "single_first_token_seconds": (single.first_token_seconds,),
                "crowd_seconds": (median(crowd_seconds),),
                "crowd_last_seconds": (max(crowd_seconds),),
            }
        )

    def _questions(self, round_index: int) -> tuple[list[Question], Question]:
        questions = stories(round_index, self.crowd + 1, self.max_tokens, series=8)
        popular = [replace(question, adapter=adapter_id(_KIND, 0)) for question in questions[:-1]]
        return popular, replace(questions[-1], adapter=adapter_id(_KIND, 1))


def case(sizes: Sizes) -> Case:
    """On mlx-graft and on mlx_lm.server."""
    measures = [
        Fairness(SideSpec(kind, (AdapterSet(_KIND, 2),)), sizes.crowd, sizes.max_tokens)
        for kind in (SideKind.GRAFT, SideKind.MLX_LM)
    ]
    figures = [
        Figure(f"{whose} ÷ on an idle server, {each.side}", Term(each, quantity), Term(each, "idle_seconds"))
        for each in measures
        for whose, quantity in (
            ("the lone request's time", "single_seconds"),
            ("the crowd's median time", "crowd_seconds"),
        )
    ]
    return Case(
        name="fairness",
        about="A lone request that comes after a crowd of requests for another adapter.",
        measures=tuple(measures),
        figures=tuple(figures),
        columns=tuple(
            Column(heading, quantity, digits=2)
            for heading, quantity in (
                ("idle server, s", "idle_seconds"),
                ("lone request, s", "single_seconds"),
                ("its first token, s", "single_first_token_seconds"),
                ("crowd's median, s", "crowd_seconds"),
                ("crowd's last, s", "crowd_last_seconds"),
            )
        ),
    )

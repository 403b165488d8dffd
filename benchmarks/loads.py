"""The measures that most cases are made of: so many questions, over so many adapters, on one side.

Knows how questions are made and what is read from the answers; knows no case and no goal.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from benchmarks.adapters import RANK_8_QV, AdapterKind
from benchmarks.case import Sample
from benchmarks.library import adapter_id
from benchmarks.load import LoadResult
from benchmarks.prompts import instruction, passages, story
from benchmarks.sides import Question, Side, SideKind, SideSpec

__all__ = ["LoadMeasure", "PassageLoad", "deal", "sample_of", "stories", "uneven"]

_WARM_UP_TOKENS = 2
_PROMPT_WARM_UP_TOKENS = 4
_AROUND_TOKENS = 12  # about what a template and the question put around a passage
_SERIES_NUMBERS = 4000
_FIRST_PASSAGE = 500_000  # beyond the numbers of stories
_SHARES = (1.0, 0.5, 1.5, 0.75, 1.25)


def stories(round_index: int, count: int, max_tokens: int, series: int = 0) -> list[Question]:
    """`count` questions to the base, with no beginning in common with those of any other round or series.

    The same numbers give the same questions, and all rounds and series have prompts of the same lengths.
    """
    first = (series * 100 + round_index) * 1000
    return [Question(instruction(first + index), story(index), max_tokens) for index in range(count)]


def uneven(questions: Sequence[Question]) -> list[Question]:
    """The same questions, their answers from half as long to half as long again; as long as before in all.

    With answers of one length a closed loop runs in step: all prompts are read at once, then all decode.
    """
    return [
        replace(question, max_tokens=max(1, round(question.max_tokens * _SHARES[index % len(_SHARES)])))
        for index, question in enumerate(questions)
    ]


def deal(questions: Sequence[Question], adapters: Sequence[str]) -> list[Question]:
    """Let the questions be answered by the adapters in turn; without adapters, by the base."""
    if not adapters:
        return list(questions)
    return [
        replace(question, adapter=adapters[index % len(adapters)]) for index, question in enumerate(questions)
    ]


def sample_of(result: LoadResult, notes: Sequence[str] = ()) -> Sample:
    """Rates and times of a load."""
    prompt_tokens = sum(answer.prompt_tokens for answer in result.answers)
    cached_tokens = sum(answer.cached_tokens for answer in result.answers)
    retries = sum(answer.retries for answer in result.answers)
    remarks = [f"{retries} connections were refused or reset, and were tried again"] if retries else []
    return Sample(
        values={
            "tokens_per_second": (result.tokens_per_second,),
            "first_token_seconds": tuple(answer.first_token_seconds for answer in result.answers),
            "gap_seconds": tuple(gap for answer in result.answers for gap in answer.gap_seconds),
            "answer_seconds": tuple(answer.seconds for answer in result.answers),
            "load_seconds": (result.seconds,),
            "completion_tokens": (float(result.completion_tokens),),
            "cached_percent": (100 * cached_tokens / prompt_tokens,),
        },
        texts=tuple(answer.text for answer in result.answers),
        notes=(*remarks, *notes),
    )


@dataclass(frozen=True, slots=True)
class LoadMeasure:
    """`requests` questions, `in_flight` of them at a time (all at once when 0), dealt to `adapters` adapters.

    0 adapters is the base alone. Measures of the same `series` ask the same questions, which must not be
    if one and the same adapter of one side would get them twice.
    """

    side: SideSpec
    requests: int
    max_tokens: int
    adapters: int = 0
    kind: AdapterKind = RANK_8_QV
    series: int = 0
    in_flight: int = 0

    @property
    def name(self) -> str:
        """What is asked of whom."""
        return f"{self.side}, {self._what}"

    @property
    def asked(self) -> Hashable:
        """Everything but who is asked."""
        return self.requests, self.max_tokens, self.adapters, self.kind, self.series

    async def prepare(self, side: Side) -> None:
        """A short load: loads all adapters, and compiles what has to be."""
        questions = [replace(each, max_tokens=_WARM_UP_TOKENS) for each in self.ask(0)]
        # mlx_lm.server loads an adapter anew for every group of requests, and keeps none.
        few = 1 if self.side.kind is SideKind.MLX_LM else self.adapters
        await side.ask(questions[: max(few, 2)], in_flight=self.in_flight or None)

    async def run(self, side: Side, round_index: int) -> Sample:
        """Ask, and wait for all answers."""
        result = await side.ask(self.ask(round_index), in_flight=self.in_flight or None)
        return sample_of(result)

    def ask(self, round_index: int) -> list[Question]:
        """The questions of a round."""
        questions = stories(round_index, self.requests, self.max_tokens, self.series)
        if self.in_flight:
            questions = uneven(questions)
        return deal(questions, [adapter_id(self.kind, index) for index in range(self.adapters)])

    @property
    def _what(self) -> str:
        at_once = f"{self.requests} requests"
        if self.in_flight:
            at_once += f", {self.in_flight} at a time"
        if not self.adapters:
            return f"base, {at_once}"
        adapters = "1 adapter" if self.adapters == 1 else f"{self.adapters} adapters"
        return f"{adapters} ({self.kind}), {at_once}"


@dataclass(frozen=True, slots=True)
class PassageLoad:
    """`requests` questions with long prompts, all at once, evenly, or by chance.

    `prompts` and `answers` are the shortest and the longest, in tokens, evenly spread. One comes every
    `every_seconds`; with `percent`, they come as a Poisson process, at that part of the rate at which a bare
    generator answers them when all are there from the start. A third of them goes to the base, the others
    to `adapters` in turn, without adapters all to the base. Sides with equal loads are asked the same at the
    same times; those with a `percent` have to have a bare generator first among them.
    """

    side: SideSpec
    requests: int
    prompts: tuple[int, int]
    answers: tuple[int, int]
    adapters: tuple[str, ...] = ()
    every_seconds: float = 0.0
    percent: int = 0
    series: int = 0

    @property
    def name(self) -> str:
        """What is asked of whom."""
        come = "at once"
        if self.every_seconds:
            come = f"every {1000 * self.every_seconds:.0f} ms"
        elif self.percent:
            come = f"by chance, load {self.percent} %"
        whom = f"a third base, {len(self.adapters)} adapters" if self.adapters else "base"
        return (
            f"{self.side}, {whom}, {self.requests} requests {come}, prompts of {_span(self.prompts)} tokens"
        )

    @property
    def asked(self) -> Hashable:
        """Everything but who is asked; answers to the base alone are compared."""
        return None if self.adapters else (self._load, self.every_seconds)

    async def prepare(self, side: Side) -> None:
        """All prompts with short answers, which compiles what has to be; a bare generator then all of it."""
        questions = self.ask(side, 0)
        short = [replace(each, max_tokens=_PROMPT_WARM_UP_TOKENS, arrives_seconds=0) for each in questions]
        await side.ask(short)
        if self.percent and self.side.kind is SideKind.BARE:
            result = await side.ask([replace(each, arrives_seconds=0) for each in questions])
            side.context.capacities[self._load] = self.requests / result.seconds

    async def run(self, side: Side, round_index: int) -> Sample:
        """Ask as they come, and wait for all answers."""
        questions = self.ask(side, round_index)
        sample = sample_of(await side.ask(questions))
        last_seconds = questions[-1].arrives_seconds
        rate = {"requests_per_second": (self.requests / last_seconds,)} if last_seconds else {}
        return replace(sample, values={**sample.values, **rate})

    def ask(self, side: Side, round_index: int) -> list[Question]:
        """The questions of a round, in the order in which they come; the first comes at once."""
        draw = random.Random(f"{self.series} {round_index}")
        lengths = [draw.randint(*self.prompts) for _ in range(self.requests)]
        answers = [draw.randint(*self.answers) for _ in range(self.requests)]
        gaps = [draw.expovariate(1.0) if self.percent else self.every_seconds for _ in range(self.requests)]
        if self.percent:
            # Without a generator's rate, as in a warm-up, all come at once.
            rate = side.context.capacities.get(self._load, 0.0) * self.percent / 100
            gaps = [gap / rate if rate else 0.0 for gap in gaps]
        first = _FIRST_PASSAGE + self.series * _SERIES_NUMBERS + round_index * self.requests
        texts = passages(side.context.model_path, first, [max(8, one - _AROUND_TOKENS) for one in lengths])
        return [
            Question(text, "Go on.", answer, self._adapter(index), sum(gaps[:index]))
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]

    def _adapter(self, index: int) -> str | None:
        thirds, rest = divmod(index, 3)
        if not self.adapters or not rest:
            return None
        return self.adapters[(2 * thirds + rest - 1) % len(self.adapters)]

    @property
    def _load(self) -> Hashable:
        return self.requests, self.prompts, self.answers, self.percent, self.series


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"

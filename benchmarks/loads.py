"""The measures that most cases are made of: so many questions, over so many adapters, on one side.

Knows how questions are made and what is read from the answers; knows no case and no goal.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.adapters import KindName
from benchmarks.case import Sample
from benchmarks.library import adapter_id
from benchmarks.load import LoadResult
from benchmarks.prompts import instruction, story
from benchmarks.sides import Question, Side, SideKind, SideSpec

__all__ = ["LoadMeasure", "deal", "sample_of", "stories", "uneven"]

_WARM_UP_TOKENS = 2
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
    kind: KindName = KindName.RANK_8_QV
    series: int = 0
    in_flight: int = 0

    @property
    def name(self) -> str:
        """What is asked of whom."""
        return f"{self.side}, {self._what}"

    @property
    def parameters(self) -> Mapping[str, str | int | float]:
        """For tables and plots."""
        return {
            "side": str(self.side),
            "load": "mixed" if self.adapters else "base",
            "requests": self.requests,
            "in_flight": self.in_flight or self.requests,
            "max_tokens": self.max_tokens,
            "adapters": self.adapters,
            **({"adapter_kind": str(self.kind)} if self.adapters else {}),
        }

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

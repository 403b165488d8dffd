"""What was measured, and the statistics of it. Pure: knows neither servers nor how results are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.cases import Case, Measure, Ratio

__all__ = [
    "Answer",
    "LoadResult",
    "Outcome",
    "RatioResult",
    "Rounds",
    "Spread",
    "agreement",
    "ratio_result",
    "spread",
]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end. Times run from the start of the whole load; `retries` are refused connections."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float
    retries: int = 0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load, from the first request's start to the last one's end."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def completion_tokens(self) -> int:
        """Tokens that were really produced, as the side counts them."""
        return sum(answer.completion_tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Produced tokens of all requests over the time that all took."""
        return self.completion_tokens / self.seconds

    @property
    def first_token_seconds(self) -> float:
        """The median over the requests."""
        return median(answer.first_token_seconds for answer in self.answers)


Rounds = Mapping[int, LoadResult]
"""The results of one measure by round index; a side that ran fewer rounds has fewer."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Several values of one quantity."""

    median: float
    lowest: float
    highest: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RatioResult:
    """A ratio over the rounds that both of its measures ran."""

    ratio: Ratio
    spread: Spread
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole run: what each measure gave, and sentences about what went other than planned."""

    cases: tuple[Case, ...]
    rounds: Mapping[Measure, Rounds]
    notes: tuple[str, ...]

    def ratios(self) -> list[RatioResult]:
        """The ratios of all cases, in order."""
        return [ratio_result(ratio, self.rounds) for case in self.cases for ratio in case.ratios]


def spread(values: Sequence[float]) -> Spread:
    """Raises: ValueError without values."""
    if not values:
        raise ValueError("expected at least one value, got none")
    return Spread(median(values), min(values), max(values), tuple(values))


def ratio_result(ratio: Ratio, rounds: Mapping[Measure, Rounds]) -> RatioResult:
    """Divide round by round, so that what slows a whole round cancels out.

    Raises: ValueError if the measures have no round in common.
    """
    above, below = rounds[ratio.numerator], rounds[ratio.denominator]
    common = tuple(sorted(above.keys() & below.keys()))
    values = [above[index].tokens_per_second / below[index].tokens_per_second for index in common]
    return RatioResult(ratio, spread(values), common)


def agreement(left: Rounds, right: Rounds) -> tuple[int, int]:
    """(answers with the same text, answers compared), over the rounds that both ran.

    Space around a text does not count: mlx-lm's streaming detokenizer drops an answer's first space.
    """
    pairs = [
        (ours.text.strip(), theirs.text.strip())
        for index in left.keys() & right.keys()
        for ours, theirs in zip(left[index].answers, right[index].answers, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)

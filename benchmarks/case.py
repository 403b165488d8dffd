"""What a benchmark is made of: measures, figures with goals, and cases that hold them together.

Plain data and one protocol. Knows neither how a side is started nor how results are shown.

A measure is run once a round on its side and gives samples of named quantities. A figure is one number a
round: a statistic of one quantity, mostly divided by another's of the same round, so that what slows a
whole round cancels out. Cases of the same stage are measured together, each measure of theirs once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.sides import Side, SideSpec
from benchmarks.summary import Statistic

__all__ = [
    "FIRST_TOKEN",
    "GAP",
    "RATE",
    "Case",
    "Column",
    "Figure",
    "Goal",
    "Measure",
    "Sample",
    "Samples",
    "Term",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round of a measure gave.

    `values` are by quantity, whose name ends in its unit; `texts` are the answers, in the order of the
    questions; `notes` are sentences about what went other than planned.
    """

    values: Mapping[str, tuple[float, ...]]
    texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Measure(Protocol):
    """Something that can be measured again and again; compared by value, so that cases can share it."""

    @property
    def name(self) -> str:
        """Unique within a case's stage."""
        ...

    @property
    def side(self) -> SideSpec:
        """What it is measured on."""
        ...

    @property
    def asked(self) -> Hashable:
        """Measures that put the same to their sides, so that answers should be the same; None: no such."""
        ...

    async def prepare(self, side: Side) -> None:
        """Bring the side to where a round may begin; called once, before the first round."""
        ...

    async def run(self, side: Side, round_index: int) -> Sample:
        """Measure once; rounds count from 1. Raises: ProcessError, LoadError."""
        ...


Samples = Mapping[Measure, Mapping[int, Sample]]
"""The samples of measures by round."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that a figure is to keep."""

    bound: float
    at_least: bool

    def reached(self, value: float) -> bool:
        """Whether `value` keeps the bound; the bound itself does."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Term:
    """A statistic of one quantity of a measure's round."""

    measure: Measure
    quantity: str
    statistic: Statistic = Statistic.MEDIAN

    def of(self, sample: Sample) -> float:
        """Raises: ValueError if the sample has no value of the quantity."""
        values = sample.values.get(self.quantity, ())
        if not values:
            raise ValueError(
                f"expected {self.measure.name} to give {self.quantity}, it gave {', '.join(sample.values)}"
            )
        return self.statistic.of(values)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number a round: `above`, divided by `below` where there is one. `unit` is "", "%" or " s"."""

    label: str
    above: Term
    below: Term | None = None
    goal: Goal | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a case's own table: over all rounds, the statistic of all values of a quantity."""

    heading: str
    quantity: str
    statistic: Statistic = Statistic.MEDIAN
    factor: float = 1.0
    digits: int = 1


RATE = Column("tokens/s", "tokens_per_second")
FIRST_TOKEN = Column("first token, ms", "first_token_seconds", factor=1000, digits=0)
GAP = Column("between tokens, ms", "gap_seconds", factor=1000, digits=0)


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison. `stage` is the name of those that share their measures, by default the case alone.

    `rounds` replaces the run's number of rounds where only one makes sense. `round_seconds` is about what a
    round takes on a slow machine, beside the other cases' of its stage: it says how cases share a limited
    time, and no figure comes of it. `remarks` reads the samples and says what does not mean what it seems to.
    """

    name: str
    about: str
    measures: tuple[Measure, ...]
    figures: tuple[Figure, ...] = ()
    columns: tuple[Column, ...] = (RATE, FIRST_TOKEN, GAP)
    stage: str = ""
    rounds: int | None = None
    round_seconds: float = 30
    remarks: Callable[[Samples], list[str]] = field(default=lambda samples: [])

    @property
    def measured_with(self) -> str:
        """The stage's name."""
        return self.stage or self.name

    def __post_init__(self) -> None:
        terms = [term for figure in self.figures for term in (figure.above, figure.below) if term]
        if missing := {term.measure.name for term in terms if term.measure not in self.measures}:
            raise ValueError(f"expected the case {self.name} to take {', '.join(sorted(missing))}")

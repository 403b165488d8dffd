"""The report of a run, as it is written to a file and read back: everything measured and what it depends on.

What is shown to people, on a terminal, in a page or in a plot, is read from here and from nowhere else.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.case import Column, Figure, Measure, Sample, Samples, Term
from benchmarks.runner import CaseOutcome
from benchmarks.summary import Spread, Statistic, spread
from server.environment import Environment, ModelFacts

__all__ = [
    "SCHEMA_VERSION",
    "CaseRecord",
    "ColumnRecord",
    "FigureRecord",
    "GoalRecord",
    "MeasureRecord",
    "Report",
    "ReportError",
    "RoundRecord",
    "agreement",
    "command_of",
    "figure_spread",
    "make_report",
    "read_report",
]

SCHEMA_VERSION = 2
_DIGITS = 6


class ReportError(Exception):
    """A file that is no report; the message says what is wrong with it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoundRecord(_Record):
    """One round of a measure: the samples by quantity, and the answers."""

    round: int
    values: dict[str, list[float]]
    texts: list[str]


class MeasureRecord(_Record):
    """A measure and all its rounds."""

    name: str
    parameters: dict[str, str | int | float]
    rounds: list[RoundRecord]

    def values(self, quantity: str) -> list[float]:
        """All samples of a quantity, over all rounds; none if the measure has no such quantity."""
        return [value for each in self.rounds for value in each.values.get(quantity, ())]


class GoalRecord(_Record):
    """A bound: the smallest value that reaches the goal, or the largest."""

    bound: float
    at_least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


class TermRecord(_Record):
    """What a figure is made of."""

    measure: str
    quantity: str
    statistic: Statistic


class FigureRecord(_Record):
    """One number a round, and what was wanted of it; `reached` is about the median, null without a goal."""

    label: str
    above: TermRecord
    below: TermRecord | None
    unit: str
    goal: GoalRecord | None
    reached: bool | None
    rounds: list[int]
    median: float
    lowest: float
    highest: float
    values: list[float]


class ColumnRecord(_Record):
    """A column of the case's table: a statistic of a quantity, times `factor`."""

    heading: str
    quantity: str
    statistic: Statistic
    factor: float
    digits: int


class AgreementRecord(_Record):
    """How many answers of two measures that were asked the same were the same, word for word."""

    left: str
    right: str
    same: int
    compared: int


class CaseRecord(_Record):
    """A case; `failure` says why it has no measures."""

    name: str
    about: str
    columns: list[ColumnRecord]
    measures: list[MeasureRecord]
    figures: list[FigureRecord]
    same_answers: list[AgreementRecord]
    notes: list[str]
    failure: str | None


class Report(_Record):
    """A whole run. `options` are the run's own, by name; `command` is how it was started, without folders."""

    schema_version: Literal[2]
    created: datetime
    command: str
    seconds: float
    environment: Environment
    model: ModelFacts
    options: dict[str, Any]
    cases: list[CaseRecord]
    notes: list[str]

    @property
    def figures(self) -> Iterator[FigureRecord]:
        """Those of all cases."""
        return (figure for case in self.cases for figure in case.figures)

    def to_json(self) -> str:
        """The text of a file."""
        return self.model_dump_json(indent=1) + "\n"


def read_report(path: Path) -> Report:
    """Raises: ReportError if the file is no report of this version; OSError."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"expected a report of schema {SCHEMA_VERSION} in {path.name}, but {place or 'the file'}: "
            f"{first['msg']}. Make it anew with mlx-graft bench --json {path.name}"
        ) from error


def make_report(
    outcomes: Sequence[CaseOutcome],
    *,
    options: dict[str, Any],
    model: ModelFacts,
    environment: Environment,
    seconds: float,
    notes: Sequence[str],
) -> Report:
    """Put what was measured into the form that is kept."""
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).replace(microsecond=0),
        command=command_of(sys.argv[1:]),
        seconds=round(seconds, 1),
        environment=environment,
        model=model,
        options=options,
        cases=[_case(outcome) for outcome in outcomes],
        notes=list(notes),
    )


def command_of(arguments: Sequence[str]) -> str:
    """The command as others can type it: of files and folders the names alone."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument[:2] == "--" else ("", "", argument)
        shown.append(option + equals + (Path(value).name or value))
    return shlex.join(["mlx-graft", *shown])


def _case(outcome: CaseOutcome) -> CaseRecord:
    case, samples = outcome.case, outcome.samples
    notes = []
    if samples:
        noted = (
            (measure, note)
            for measure in samples
            for each in samples[measure].values()
            for note in each.notes
        )
        notes = list(dict.fromkeys(f"{measure.name}: {note}" for measure, note in noted))
        notes += case.remarks(samples)
        most = max(map(len, samples.values()))
        notes += [
            f"{measure.name}: {len(rounds)} of {most} rounds, for want of time"
            for measure, rounds in samples.items()
            if len(rounds) < most
        ]
    return CaseRecord(
        name=case.name,
        about=case.about,
        columns=[_column(column) for column in case.columns],
        measures=[_measure(measure, samples[measure]) for measure in case.measures if measure in samples],
        figures=[_figure(figure, samples) for figure in case.figures] if samples else [],
        same_answers=list(_agreements(samples)),
        notes=notes,
        failure=outcome.failure,
    )


def _measure(measure: Measure, rounds: Mapping[int, Sample]) -> MeasureRecord:
    return MeasureRecord(
        name=measure.name,
        parameters=dict(measure.parameters),
        rounds=[
            RoundRecord(
                round=index,
                values={
                    quantity: [round(value, _DIGITS) for value in values]
                    for quantity, values in sample.values.items()
                },
                texts=list(sample.texts),
            )
            for index, sample in sorted(rounds.items())
        ],
    )


def _column(column: Column) -> ColumnRecord:
    return ColumnRecord(
        heading=column.heading,
        quantity=column.quantity,
        statistic=column.statistic,
        factor=column.factor,
        digits=column.digits,
    )


def _term(term: Term) -> TermRecord:
    return TermRecord(measure=term.measure.name, quantity=term.quantity, statistic=term.statistic)


def _figure(figure: Figure, samples: Samples) -> FigureRecord:
    rounds, found = figure_spread(figure, samples)
    goal = figure.goal
    return FigureRecord(
        label=figure.label,
        above=_term(figure.above),
        below=None if figure.below is None else _term(figure.below),
        unit=figure.unit,
        goal=None if goal is None else GoalRecord(bound=goal.bound, at_least=goal.at_least),
        reached=None if goal is None else goal.reached(found.median),
        rounds=rounds,
        median=found.median,
        lowest=found.lowest,
        highest=found.highest,
        values=list(found.values),
    )


def figure_spread(figure: Figure, samples: Samples) -> tuple[list[int], Spread]:
    """The rounds that all of a figure's measures ran, and its value in each.

    Raises: ValueError if there is no such round.
    """
    above = samples[figure.above.measure]
    below = samples[figure.below.measure] if figure.below else above
    rounds = sorted(above.keys() & below.keys())
    values = [
        figure.above.of(above[index]) / (figure.below.of(below[index]) if figure.below else 1.0)
        for index in rounds
    ]
    return rounds, spread(values)


def _agreements(samples: Samples) -> Iterator[AgreementRecord]:
    for left, right in combinations(samples, 2):
        if left.asked is not None and left.asked == right.asked:
            same, compared = agreement(samples[left], samples[right])
            yield AgreementRecord(left=left.name, right=right.name, same=same, compared=compared)


def agreement(left: Mapping[int, Sample], right: Mapping[int, Sample]) -> tuple[int, int]:
    """(answers with the same text, answers compared), over the rounds that both ran.

    Space around a text does not count: mlx-lm's streaming detokenizer drops an answer's first space.
    """
    pairs = [
        (ours.strip(), theirs.strip())
        for index in left.keys() & right.keys()
        for ours, theirs in zip(left[index].texts, right[index].texts, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)

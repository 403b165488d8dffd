"""The report of a run, as it is written to a file and read back: everything measured and what it depends on.

What is shown to people, on a terminal or in a page, is read from here and from nowhere else. What a case is
made of, such as samples, columns and goals, is kept as `benchmarks.case` has it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from benchmarks.case import Column, Figure, Goal, Sample, Samples
from benchmarks.runner import CaseOutcome
from benchmarks.summary import Spread, spread
from server.environment import Environment, ModelFacts

__all__ = [
    "SCHEMA_VERSION",
    "CaseRecord",
    "FigureRecord",
    "MeasureRecord",
    "Report",
    "ReportError",
    "agreement",
    "command_of",
    "figure_spread",
    "make_report",
    "read_report",
]

SCHEMA_VERSION = 3
_DIGITS = 6


class ReportError(Exception):
    """A file that is no report; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class MeasureRecord:
    """A measure's samples by round."""

    name: str
    rounds: dict[int, Sample]

    def values(self, quantity: str) -> list[float]:
        """All samples of a quantity, over all rounds; none if the measure has no such quantity."""
        return [value for each in self.rounds.values() for value in each.values.get(quantity, ())]


@dataclass(frozen=True, slots=True)
class FigureRecord:
    """A figure's value by round, and what was wanted of it; `reached` is None without a goal."""

    label: str
    unit: str
    goal: Goal | None
    reached: bool | None
    median: float
    lowest: float
    highest: float
    values: dict[int, float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many answers of two measures that were asked the same were the same, word for word."""

    left: str
    right: str
    same: int
    compared: int


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """A case; `failure` says why it has no measures."""

    name: str
    about: str
    columns: tuple[Column, ...]
    measures: tuple[MeasureRecord, ...]
    figures: tuple[FigureRecord, ...]
    same_answers: tuple[Agreement, ...]
    notes: tuple[str, ...]
    failure: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run. `options` are the run's own, by name; `command` is how it was started, without folders."""

    schema_version: Literal[3]
    created: datetime
    command: str
    seconds: float
    environment: Environment
    model: ModelFacts
    options: dict[str, Any]
    cases: tuple[CaseRecord, ...]
    notes: tuple[str, ...]

    @property
    def figures(self) -> Iterator[FigureRecord]:
        """Those of all cases."""
        return (figure for case in self.cases for figure in case.figures)

    @property
    def on_gpu(self) -> bool:
        """Whether the sizes, and with them the goals, were those for a GPU."""
        return bool(self.options.get("sizes", {}).get("on_gpu"))

    def to_json(self) -> str:
        """The text of a file."""
        return TypeAdapter(Report).dump_json(self, indent=1).decode() + "\n"


def read_report(path: Path) -> Report:
    """Raises: ReportError if the file is no report of this version; OSError."""
    try:
        return TypeAdapter(Report).validate_json(path.read_bytes())
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
        cases=tuple(map(_case, outcomes)),
        notes=tuple(notes),
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
    measured = [measure for measure in case.measures if measure in samples]
    return CaseRecord(
        name=case.name,
        about=case.about,
        columns=case.columns,
        measures=tuple(MeasureRecord(each.name, _rounded(samples[each])) for each in measured),
        figures=tuple(_figure(figure, samples) for figure in case.figures) if samples else (),
        same_answers=tuple(_agreements(samples)),
        notes=tuple(_notes(outcome)) if samples else (),
        failure=outcome.failure,
    )


def _rounded(rounds: Mapping[int, Sample]) -> dict[int, Sample]:
    return {
        index: replace(
            sample,
            values={
                quantity: tuple(round(value, _DIGITS) for value in values)
                for quantity, values in sample.values.items()
            },
        )
        for index, sample in sorted(rounds.items())
    }


def _notes(outcome: CaseOutcome) -> Iterator[str]:
    samples = outcome.samples
    noted = (
        (measure, note) for measure in samples for each in samples[measure].values() for note in each.notes
    )
    yield from dict.fromkeys(f"{measure.name}: {note}" for measure, note in noted)
    yield from outcome.case.remarks(samples)
    most = max(map(len, samples.values()))
    for measure, rounds in samples.items():
        if len(rounds) < most:
            yield f"{measure.name}: {len(rounds)} of {most} rounds: there was no time for more"


def _figure(figure: Figure, samples: Samples) -> FigureRecord:
    rounds, found = figure_spread(figure, samples)
    return FigureRecord(
        label=figure.label,
        unit=figure.unit,
        goal=figure.goal,
        reached=None if figure.goal is None else figure.goal.reached(found.median),
        median=found.median,
        lowest=found.lowest,
        highest=found.highest,
        values=dict(zip(rounds, found.values, strict=True)),
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


def _agreements(samples: Samples) -> Iterator[Agreement]:
    for left, right in combinations(samples, 2):
        if left.asked is not None and left.asked == right.asked:
            same, compared = agreement(samples[left], samples[right])
            yield Agreement(left=left.name, right=right.name, same=same, compared=compared)


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

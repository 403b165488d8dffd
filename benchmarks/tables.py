"""The rows of a report's tables, in words, and the terminal's view of them. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.case import Column
from benchmarks.report import CaseRecord, FigureRecord, MeasureRecord, Report

__all__ = ["FIGURE_HEADINGS", "conditions", "figure_rows", "measure_table", "number", "run_of", "show"]

FIGURE_HEADINGS = ("figure", "median", "lowest to highest", "goal", "reached", "rounds")


def show(report: Report, console: Console) -> None:
    """Print everything but the samples."""
    for case in report.cases:
        if case.measures:
            console.print(_table(f"{case.name}: {case.about}", *measure_table(case)))
            for pair in case.same_answers:
                equal = f"{pair.left} and {pair.right}: {pair.same} of {pair.compared}"
                _say(console, f"Same answers, word for word: {equal}.")
            for note in case.notes:
                _say(console, f"Note: {note}.")
    for failure in dict.fromkeys(case.failure for case in report.cases if case.failure is not None):
        names = ", ".join(case.name for case in report.cases if case.failure == failure)
        console.print(f"[red]Failed:[/red] {names}: {escape(failure)}", highlight=False, soft_wrap=True)
    if any(report.figures):
        title = "Figures, one a round: medians"
        console.print(_table(title, FIGURE_HEADINGS, figure_rows(report.figures)))
    for line in (run_of(report), *conditions(report)):
        _say(console, line)


def _say(console: Console, line: str) -> None:
    console.print(escape(line), highlight=False, soft_wrap=True)


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def run_of(report: Report) -> str:
    """Which run a report is of: when it was, and its command."""
    return f"Run of {report.created:%Y-%m-%d %H:%M} UTC. Command: {report.command}"


def conditions(report: Report) -> Iterator[str]:
    """What the figures of a run depend on, in sentences."""
    environment = report.environment
    yield "Values of a measure are medians over the samples of all rounds, unless a heading says otherwise."
    yield (
        f"Model: {report.model.name}, {report.model.dtype}. MLX on {environment.device}, BLAS "
        f"{environment.blas} ({environment.blas_threads})."
    )
    yield f"Machine: {environment.processor}, {environment.cores} cores, {environment.system}."
    versions = "; ".join(f"{name} {version}" for name, version in environment.packages.items())
    yield f"Python {environment.python}; {versions}."
    yield (
        f"Load average before the run {environment.load_average:.2f}; the whole run took "
        f"{report.seconds:.0f} seconds."
    )
    for note in report.notes:
        yield f"Note: {note}"


def figure_rows(figures: Iterable[FigureRecord]) -> list[tuple[str, ...]]:
    """The cells below `FIGURE_HEADINGS`."""
    return [
        (
            figure.label,
            number(figure.median) + figure.unit,
            f"{number(figure.lowest)} to {number(figure.highest)}{figure.unit}",
            "" if figure.goal is None else f"{figure.goal}{figure.unit}",
            {True: "yes", False: "no", None: ""}[figure.reached],
            str(len(figure.values)),
        )
        for figure in figures
    ]


def measure_table(case: CaseRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headings of a case's own table, and the cells of each measure."""
    headings = ("measure", *(column.heading for column in case.columns), "rounds")
    rows = [
        (each.name, *(_cell(each, column) for column in case.columns), str(len(each.rounds)))
        for each in case.measures
    ]
    return headings, rows


def _cell(measure: MeasureRecord, column: Column) -> str:
    """A column's value; "" for a measure that has no such quantity."""
    values = measure.values(column.quantity)
    return f"{column.statistic.of(values) * column.factor:.{column.digits}f}" if values else ""


def number(value: float) -> str:
    """Three significant digits, but never more than two after the point."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

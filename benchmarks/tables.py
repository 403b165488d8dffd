"""Shows a report on a terminal: the goal table first, then each case's own table. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.report import CaseRecord, ColumnRecord, FigureRecord, MeasureRecord, Report

__all__ = ["cell", "conditions", "number", "reached_word", "run_of", "show", "span"]


def show(report: Report, console: Console) -> None:
    """Print everything but the samples."""
    for case in report.cases:
        if case.measures:
            console.print(_measures(case))
            for line in _remarks(case):
                console.print(escape(line), highlight=False, soft_wrap=True)
    for failure in dict.fromkeys(case.failure for case in report.cases if case.failure is not None):
        names = ", ".join(case.name for case in report.cases if case.failure == failure)
        console.print(f"[red]Failed:[/red] {names}: {escape(failure)}", highlight=False, soft_wrap=True)
    if any(report.figures):
        console.print(_figures(report))
    for line in (run_of(report), *conditions(report)):
        console.print(escape(line), highlight=False, soft_wrap=True)


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


def _figures(report: Report) -> Table:
    table = Table(title="Figures, one a round: medians", title_justify="left")
    table.add_column("figure", overflow="fold")
    for heading in ("median", "lowest to highest", "goal", "reached", "rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in report.figures:
        goal = "" if figure.goal is None else str(figure.goal) + figure.unit
        style = {True: "green", False: "red", None: ""}[figure.reached]
        table.add_row(
            escape(figure.label),
            number(figure.median) + figure.unit,
            span(figure),
            goal,
            f"[{style}]{reached_word(figure)}[/]" if style else "",
            str(len(figure.rounds)),
        )
    return table


def _measures(case: CaseRecord) -> Table:
    table = Table(title=escape(f"{case.name}: {case.about}"), title_justify="left")
    table.add_column("measure", overflow="fold")
    for column in case.columns:
        table.add_column(column.heading, justify="right")
    table.add_column("rounds", justify="right")
    for measure in case.measures:
        cells = [cell(measure, column) for column in case.columns]
        table.add_row(escape(measure.name), *cells, str(len(measure.rounds)))
    return table


def _remarks(case: CaseRecord) -> Iterator[str]:
    for pair in case.same_answers:
        yield f"Same answers, word for word: {pair.left} and {pair.right}: {pair.same} of {pair.compared}."
    for note in case.notes:
        yield f"Note: {note}."


def cell(measure: MeasureRecord, column: ColumnRecord) -> str:
    """A column's value; "" for a measure that has no such quantity."""
    values = measure.values(column.quantity)
    return f"{column.statistic.of(values) * column.factor:.{column.digits}f}" if values else ""


def number(value: float) -> str:
    """Three significant digits, but never more than two after the point."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def span(figure: FigureRecord) -> str:
    """The smallest and the largest round."""
    return f"{number(figure.lowest)} to {number(figure.highest)}{figure.unit}"


def reached_word(figure: FigureRecord) -> str:
    """Whether the goal is reached, in a word; "" without a goal."""
    return {True: "yes", False: "no", None: ""}[figure.reached]

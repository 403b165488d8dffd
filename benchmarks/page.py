"""Puts the figures of reports into a page, as tables between markers.

    python -m benchmarks.page [FILE.json…] [--gpu FILE.json]

A block begins with `<!-- bench: NAME -->` and ends with `<!-- end -->`. NAME is `goals` (the figures with
goals of each report that has all cases of the table), `gpu` (the report of benchmarks.gpu) or a case's name
(its own table). Each says which run it is of and what that depends on. What lies between the two is replaced;
a block that no report has anything for stays as it is. Computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cases import TABLE
from benchmarks.gpu_report import GpuProfile, GpuReport, read_gpu_report
from benchmarks.report import CaseRecord, FigureRecord, Report, ReportError, read_report
from benchmarks.tables import cell, conditions, number, reached_word, run_of, span

__all__ = ["PageError", "block", "fill_blocks", "filled", "main", "table"]

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_BLOCK = re.compile(r"(<!-- bench: (?P<name>[a-z-]+) -->\n)(?P<old>.*?)(<!-- end -->)", re.DOTALL)


class PageError(Exception):
    """A page without a place for figures."""


def main() -> None:
    """Run the command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(page)
    app(prog_name="python -m benchmarks.page")


def page(
    files: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, dir_okay=False, help="Reports in JSON.", metavar="[FILE]…"),
    ] = None,
    gpu: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The report of benchmarks.gpu in JSON.")
    ] = None,
    into: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The page.")] = _PAGE,
) -> None:
    """Write the figures of reports into a page, between its markers."""
    try:
        reports = [read_report(file) for file in files or ()]
        gpu_report = None if gpu is None else read_gpu_report(gpu)
        text, names = filled(into.read_text(), reports, gpu_report)
    except (PageError, ReportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    into.write_text(text)
    typer.echo(f"{into.name}: {', '.join(names)}")


def filled(text: str, reports: Sequence[Report], gpu: GpuReport | None = None) -> tuple[str, list[str]]:
    """The page with its blocks filled, and the names of those that were.

    Raises: PageError if the reports have figures for none of them.
    """
    names: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        new = _gpu(gpu) if found["name"] == "gpu" and gpu else block(found["name"], reports)
        if new is None:
            return found[0]
        names.append(found["name"])
        return f"{found[1]}{new}\n{found[4]}"

    text = _BLOCK.sub(replaced, text)
    if not names:
        raise PageError("expected a line <!-- bench: NAME --> that the reports have figures for, found none")
    return text, names


def fill_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The page with the Markdown of `blocks` between the markers of their names.

    Raises: PageError if it has no place for one of them.
    """
    missing = blocks.keys() - {found["name"] for found in _BLOCK.finditer(text)}
    if missing:
        raise PageError(f"expected a line <!-- bench: NAME --> for each of {sorted(missing)}, found none")
    return _BLOCK.sub(
        lambda found: (
            f"{found[1]}{blocks[found['name']]}\n{found[4]}" if found["name"] in blocks else found[0]
        ),
        text,
    )


def block(name: str, reports: Sequence[Report]) -> str | None:
    """The Markdown of a block, None if the reports have nothing for it."""
    if name == "goals":
        whole = [report for report in reports if {case.name for case in report.cases} >= set(TABLE)]
        return "\n\n".join(map(_goals, whole)) or None
    cases = [(report, case) for report in reports for case in report.cases if case.name == name]
    found = [(report, case) for report, case in cases if case.measures]
    return "\n\n".join(["\n".join(_case(found[-1][1])), _conditions(found[-1][0])]) if found else None


def _conditions(report: Report) -> str:
    lines = " ".join(conditions(report))
    return f"<details><summary>{escape(run_of(report))}</summary>\n\n{_escaped(lines)}\n\n</details>"


def _gpu(report: GpuReport) -> str:
    names = ("models", "kind", "rows", "rank", "blocks", "steps")
    options = ", ".join(f"{name} {report.options[name]}" for name in names if name in report.options)
    environment = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    rows = [
        (
            f"{one.model}, {one.side}",
            str(one.rows),
            str(one.adapters),
            f"{one.step_ms:.2f}",
            f"**{one.ratio:.2f}**",
            f"{one.lowest:.2f} to {one.highest:.2f}",
        )
        for one in report.results
    ]
    results = table(
        ("model, side", "rows", "adapters", "ms a step", "base ÷ side", "lowest to highest"), rows
    )
    parts = [
        f"Run of {report.created:%Y-%m-%d %H:%M} UTC: {_escaped(environment)}; {_escaped(options)}.",
        results,
    ]
    if report.profiles:
        times = [
            (f"{one.model}, {one.side}", str(one.rows), *(f"{ms:.2f}" for ms in _host_ms(one)))
            for one in report.profiles
        ]
        parts += [
            "Where a step's time goes on the host, in milliseconds:",
            table(("model, side", "rows", "building", "handing over", "waiting"), times),
        ]
    return "\n\n".join(parts)


def _host_ms(profile: GpuProfile) -> tuple[float, float, float]:
    return profile.build_ms, profile.submit_ms, profile.wait_ms


def _goals(report: Report) -> str:
    """All figures with goals, how many answers were the same, and what went other than planned.

    A case of the table that failed is named, so that no figure is missing unseen.
    """
    cases = [case for case in report.cases if any(figure.goal for figure in case.figures)]
    lines = [_figures([figure for case in cases for figure in case.figures if figure.goal])]
    pairs = [pair for case in cases for pair in case.same_answers]
    if pairs:
        same, compared = sum(pair.same for pair in pairs), sum(pair.compared for pair in pairs)
        lines.append(
            f"Of {compared} answers of sides that were asked the same, {same} are equal, word for word."
        )
    lines += [f"Note: {_escaped(note)}." for case in cases for note in case.notes]
    lines += [
        f"Failed: {case.name}: {_escaped(case.failure)}"
        for case in report.cases
        if case.failure and case.name in TABLE
    ]
    return "\n\n".join([*lines, _conditions(report)])


def _figures(figures: Sequence[FigureRecord]) -> str:
    rows = [
        (
            figure.label,
            f"**{number(figure.median)}{figure.unit}**",
            span(figure),
            f"{figure.goal or ''}{figure.unit if figure.goal else ''}",
            reached_word(figure),
            str(len(figure.rounds)),
        )
        for figure in figures
    ]
    return table(("figure", "median", "lowest to highest", "goal", "reached", "rounds"), rows)


def _case(case: CaseRecord) -> Iterator[str]:
    headings = ("measure", *(column.heading for column in case.columns), "rounds")
    rows = [
        (measure.name, *(cell(measure, column) for column in case.columns), str(len(measure.rounds)))
        for measure in case.measures
    ]
    yield table(headings, rows)
    if plain := [figure for figure in case.figures if figure.goal is None]:
        yield ""
        yield _figures(plain)
    for note in case.notes:
        yield f"\nNote: {_escaped(note)}."


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, the others are numbers."""
    lines = [headings, ["---", *("--:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()

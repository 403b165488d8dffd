"""Puts the figures of reports into a page, as tables between markers: `python -m benchmarks.page FILE.json…`

A block begins with `<!-- bench: NAME -->` and ends with `<!-- end -->`. NAME is `goals` (the figures with
goals of the reports that have all cases of the table) or a case's name (its own table); with `-gpu` after
it, it is filled from runs with the sizes for a GPU alone, and without from all others. Each says which run it
is of and what that depends on. What lies between the two is replaced; a block that no report has anything
for stays as it is. Computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cases import GPU_TABLE, TABLE
from benchmarks.report import CaseRecord, FigureRecord, Report, ReportError, read_report
from benchmarks.tables import FIGURE_HEADINGS, conditions, figure_rows, measure_table, run_of

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
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Reports in JSON.", metavar="FILE…")
    ],
    into: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The page.")] = _PAGE,
) -> None:
    """Write the figures of reports into a page, between its markers."""
    try:
        text, names = filled(into.read_text(), [read_report(file) for file in files])
    except (PageError, ReportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    into.write_text(text)
    typer.echo(f"{into.name}: {', '.join(names)}")


def filled(text: str, reports: Sequence[Report]) -> tuple[str, list[str]]:
    """The page with its blocks filled, and the names of those that were.

    Raises: PageError if the reports have figures for none of them.
    """
    names = dict.fromkeys(found["name"] for found in _BLOCK.finditer(text))
    blocks = {name: new for name in names if (new := block(name, reports)) is not None}
    if not blocks:
        raise PageError("expected a line <!-- bench: NAME --> that the reports have figures for, found none")
    return fill_blocks(text, blocks), list(blocks)


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
    on_gpu, name = name.endswith("-gpu"), name.removesuffix("-gpu")
    reports = [report for report in reports if report.on_gpu is on_gpu]
    if name == "goals":
        needed: set[str] = set(GPU_TABLE if on_gpu else TABLE)
        whole = [report for report in reports if {case.name for case in report.cases} >= needed]
        return "\n\n".join(_goals(report, needed) for report in whole) or None
    found = [(each, case) for each in reports for case in each.cases if case.name == name and case.measures]
    return "\n\n".join(["\n".join(_case(found[-1][1])), _conditions(found[-1][0])]) if found else None


def _conditions(report: Report) -> str:
    lines = " ".join(conditions(report))
    return f"<details><summary>{escape(run_of(report))}</summary>\n\n{_escaped(lines)}\n\n</details>"


def _goals(report: Report, needed: set[str]) -> str:
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
    failed = [case for case in report.cases if case.failure and case.name in needed]
    lines += [f"Failed: {case.name}: {_escaped(case.failure or '')}" for case in failed]
    return "\n\n".join([*lines, _conditions(report)])


def _figures(figures: Sequence[FigureRecord]) -> str:
    rows = [(label, f"**{median}**", *rest) for label, median, *rest in figure_rows(figures)]
    return table(FIGURE_HEADINGS, rows)


def _case(case: CaseRecord) -> Iterator[str]:
    yield table(*measure_table(case))
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

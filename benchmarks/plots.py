"""Draws the plots of the documentation from reports: `python -m benchmarks.plots FILE.json…`.

The same reports give the same files, byte for byte: no dates, no random ids. The background is transparent
and all ink is of a middle brightness, so that they can be read on light and dark pages. Needs matplotlib,
which only the project's development environment has; computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.rcsetup import cycler

from benchmarks.report import CaseRecord, MeasureRecord, Report, ReportError, read_report

__all__ = ["PLOTS", "draw", "main"]

_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "plots"
_INK = "#808890"
_COLOURS = ("#3b82c4", "#d9822b", "#2f9e6e", "#b0569e", "#c0504d")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mlx-graft",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=_COLOURS),
    "grid.color": _INK,
    "grid.alpha": 0.25,
}

Draw = Callable[[Axes, CaseRecord], None]


def main() -> None:
    """Run the command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(plots)
    app(prog_name="python -m benchmarks.plots")


def plots(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Reports in JSON.")],
    folder: Annotated[Path, typer.Option(file_okay=False, help="Where the plots go.")] = _FOLDER,
) -> None:
    """Draw a plot for each case of the reports that has one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        reports = [read_report(file) for file in files]
    except ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    drawn = [path for report in reports for path in draw(report, folder)]
    if not drawn:
        typer.echo(f"error: expected one of the cases {', '.join(PLOTS)} in the reports", err=True)
        raise typer.Exit(1)
    for path in drawn:
        typer.echo(path.name)


def draw(report: Report, folder: Path) -> list[Path]:
    """Write an SVG for each case that has a plot; returns their paths."""
    paths = []
    for case in report.cases:
        if case.name not in PLOTS or not case.measures:
            continue
        path = folder / f"{case.name}.svg"
        with mpl.rc_context(_STYLE):
            canvas = Canvas(figsize=(7, 4), layout="constrained")
            axes = canvas.subplots()
            axes.grid(axis="y")
            PLOTS[case.name](axes, case)
            canvas.suptitle(case.about, x=0.01, ha="left", fontsize=10)
            canvas.supxlabel(_footnote(report), fontsize=8, x=0.01, ha="left")
            canvas.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        paths.append(path)
    return paths


def _footnote(report: Report) -> str:
    environment = report.environment
    device = environment.device
    if environment.processor not in device:
        device += f", {environment.processor}"
    date = f"{report.created:%Y-%m-%d}"
    return f"{report.model.name}, {report.model.dtype}; {device}, {environment.cores} cores; {date}"


def _by_requests(axes: Axes, case: CaseRecord) -> None:
    for name, measures in _grouped(case, lambda each: f"{each['side']}, {each['load']}").items():
        _line(axes, name, measures, "requests", "tokens_per_second")
    _counted(axes, case, "requests", "requests at once")
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)


def _by_adapters(axes: Axes, case: CaseRecord) -> None:
    _line(axes, "mlx-graft", case.measures, "adapters", "tokens_per_second")
    _counted(axes, case, "adapters", "distinct adapters in the batch (0: the base)")
    axes.set_ylabel("tokens/s")


def _by_registered(axes: Axes, case: CaseRecord) -> None:
    _line(axes, "mlx-graft", case.measures, "registered", "tokens_per_second")
    _counted(axes, case, "registered", "registered adapters")
    for measure in case.measures:
        hits = measure.values("hit_percent")
        if hits:
            place = (float(measure.parameters["registered"]), median(measure.values("tokens_per_second")))
            axes.annotate(
                f"{median(hits):.0f} % hits",
                place,
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_ylabel("tokens/s")


def _percentiles(axes: Axes, case: CaseRecord) -> None:
    """One cumulated curve for each measure: the share of gaps that are not longer."""
    for measure in case.measures:
        gaps = sorted(measure.values("gap_seconds"))
        shares = [100 * (index + 1) / len(gaps) for index in range(len(gaps))]
        axes.plot([1000 * gap for gap in gaps], shares, label=measure.name)
    axes.set_xlabel("between tokens, ms")
    axes.set_ylabel("% not longer")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower right")


def _bars(quantities: Mapping[str, str], unit: str, factor: float) -> Draw:
    """For each measure a bar for each quantity, the median of all samples."""

    def bars(axes: Axes, case: CaseRecord) -> None:
        height = 0.8 / len(quantities)
        for index, (quantity, label) in enumerate(quantities.items()):
            places = [row + index * height for row in range(len(case.measures))]
            values = [factor * median(measure.values(quantity)) for measure in case.measures]
            drawn = axes.barh(places, values, height=height * 0.9, label=label)
            axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8, color=_INK)
        middles = [row + 0.4 - height / 2 for row in range(len(case.measures))]
        axes.set_yticks(
            middles, [measure.name.replace(", ", ",\n", 1) for measure in case.measures], fontsize=8
        )
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        if len(quantities) > 1:
            axes.legend(frameon=False)

    return bars


PLOTS: Mapping[str, Draw] = {
    "concurrency": _by_requests,
    "distinct": _by_adapters,
    "registered": _by_registered,
    "latency": _percentiles,
    "adapters": _bars({"tokens_per_second": ""}, "tokens/s", 1),
    "peer": _bars({"tokens_per_second": ""}, "tokens/s", 1),
    "loading": _bars({"seconds": ""}, "ms", 1000),
    "fairness": _bars(
        {
            "idle_seconds": "alone",
            "single_seconds": "the lone request",
            "crowd_seconds": "the crowd's median",
        },
        "seconds",
        1,
    ),
}
"""The cases that have a plot; its file bears the case's name."""


def _grouped(case: CaseRecord, name: Callable[[Mapping[str, Any]], str]) -> dict[str, list[MeasureRecord]]:
    groups: dict[str, list[MeasureRecord]] = {}
    for measure in case.measures:
        groups.setdefault(name(measure.parameters), []).append(measure)
    return groups


def _line(axes: Axes, name: str, measures: Sequence[MeasureRecord], parameter: str, quantity: str) -> None:
    """Medians, with bars from the lowest to the highest round."""
    places = [float(measure.parameters[parameter]) for measure in measures]
    samples = [measure.values(quantity) for measure in measures]
    middles = [median(values) for values in samples]
    below = [middle - min(values) for middle, values in zip(middles, samples, strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, samples, strict=True)]
    axes.errorbar(places, middles, yerr=[below, above], marker="o", capsize=3, label=name)


def _counted(axes: Axes, case: CaseRecord, parameter: str, label: str) -> None:
    """An axis of counts, marked where something was measured; from zero upwards."""
    places = sorted({int(measure.parameters[parameter]) for measure in case.measures})
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)


if __name__ == "__main__":
    main()

"""`mlx-graft adapters inspect`: what an adapter's folder holds, and whether it fits a model. No server.

Without a model, mlx-lm is not imported. Main thread.
"""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from server.cli.models import ModelFolder, Scale, lazy_model, require_mlx
from server.cli.output import fail, report_rows, report_table, say, show, warn

if TYPE_CHECKING:
    from adapters_core.report import LoadReport

__all__ = ["inspect"]


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder of an adapter.", show_default=False),
    ],
    model: ModelFolder = None,
    scale: Scale = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Show what an adapter's folder holds and, with --model, whether it fits. Needs no server."""
    require_mlx()
    from adapters_core.errors import InvalidAdapterError, UnsupportedModelError, grouped

    if not path.is_dir():
        fail(f"there is no folder {str(path)!r}.", code=2)
    try:
        report, doubts = _alone(path, scale) if model is None else (_on_model(path, model, scale), {})
    except InvalidAdapterError as error:
        _refuse(path, len(error.problems), error.told, error.details, json)
    except UnsupportedModelError as error:
        _refuse(path, len(error.reasons), grouped(error.reasons), error.reasons, json)
    if json:
        typer.echo(json_format.dumps(report.to_values() | {"fits": None if model is None else True}))
        return
    show(report_table({"folder": path.resolve().name} | report_rows(report.to_values())))
    for warning in report.warnings:
        warn(f"warning: {warning}")
    if model is None:
        say("Whether it fits a model is seen with --model.")
    else:
        say(f"It fits {model.resolve().name}.")
    for reason, count in _counted(doubts).items():
        say(f"Of {count} module(s) or tensors only the model can tell more: {reason}.")


def _alone(path: Path, scale: float | None) -> tuple[LoadReport, dict[str, str]]:
    from adapters_core.formats.unplaced import read_unplaced
    from adapters_core.report import LoadReport

    unplaced = read_unplaced(path, scale)
    return LoadReport.of(unplaced, unplaced.parts, unplaced.warnings), unplaced.open


def _on_model(path: Path, folder: Path, scale: float | None) -> LoadReport:
    from adapters_core.container import AdapterContainer
    from adapters_core.layers.modules import kind_of
    from adapters_core.layers.targets import module_at
    from adapters_core.report import LoadReport, parts_of

    container = AdapterContainer.from_directory(path, scale=scale)
    model = lazy_model(folder)
    mapped = container.place(model)
    kinds = {path: kind_of(module_at(model, path)) for path in mapped.weights}
    report = LoadReport.of(container, parts_of(mapped.weights, kinds), mapped.warnings)
    return report.beside([folder.resolve().name])


def _refuse(path: Path, count: int, told: Sequence[str], problems: Sequence[str], json: bool) -> NoReturn:
    """End the command; people are told the kinds of the `count` problems, programs all of them."""
    if json:
        typer.echo(json_format.dumps({"path": path.name, "fits": False, "problems": list(problems)}))
        raise typer.Exit(1)
    fail(f"{path.name} cannot be used, for {count} reason(s):", *told)


def _counted(doubts: dict[str, str]) -> dict[str, int]:
    reasons = list(doubts.values())
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

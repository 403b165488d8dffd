"""`mlx-graft check`: whether mixed adapters are exact on a model and this device, and what they cost.

Needs no server. The check itself is `adapters_core.check`. Main thread.
"""

from __future__ import annotations

import json as json_format
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from server.cache_dir import default_cache_dir
from server.cli.output import fail, human_bytes, report_table, say, show, warn
from server.cli.progress import Progress
from server.cli.serve import prepare_mlx
from server.settings import Dtype

if TYPE_CHECKING:
    from adapters_core.check.report import CheckReport
    from server.engine.model import LoadedModel
    from server.environment import Environment, ModelFacts

__all__ = ["check", "conclude"]


def check(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder in MLX's format, or a hub id; the demo's model when unset.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Type that weights are computed in; auto as `serve` chooses it."),
    ] = "auto",
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit of the hub id.", show_default=False),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", help="Folder for the demo's model and for what was measured.", show_default=False
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            "--rows", min=1, max=256, help="Rows of a batch. Repeatable.", show_default="1, 8 and 32"
        ),
    ] = None,
    calibration: Annotated[
        bool,
        typer.Option("--calibration/--no-calibration", help="Use the forms that `serve` would measure."),
    ] = True,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Whether speed is measured.")] = True,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            help="File for the report, to attach to a bug report.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check on a model and this device that mixed adapters are exact, and measure what they cost.

    Random LoRA and DoRA adapters of several ranks and targets are computed in mixed batches and compared with
    mlx-lm's own layers, one row at a time. The exit code is 0 if nothing differs and 1 if something does.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        fail(f"--json: there is no folder {str(json_file.parent)!r}.", code=2)
    # By default, CUDA rounds float32 products to 10 bits, too coarse to compare by.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    prepare_mlx(cache_dir or default_cache_dir())
    from adapters_core.check.model import ROW_COUNTS, check_model
    from adapters_core.check.rows import Resident
    from adapters_core.errors import AdapterError
    from server.engine.calibration import choose_forms
    from server.environment import describe_environment, describe_model

    with Progress() as progress:
        loaded = _load(model, dtype, revision, cache_dir, progress)
        environment = describe_environment()
        facts = replace(describe_model(loaded.info.path), name=loaded.info.model_id)
        progress.step("Choosing forms …")
        forms = choose_forms(loaded.model, cache_dir or default_cache_dir(), measured=calibration)
        try:
            report = check_model(
                loaded.model,
                lambda model: Resident(model, forms),
                counts=sorted(set(rows or ROW_COUNTS)),
                with_speed=speed,
                progress=progress.step,
            )
        except (AdapterError, OSError) as error:
            progress.stop()
            fail(f"{facts.name} cannot be checked: {error}")
    conclude(report, environment, facts, json_file)


def conclude(
    report: CheckReport, environment: Environment, facts: ModelFacts, json_file: Path | None
) -> None:
    """Print the report and write it to `json_file`; if something differs, end with exit code 1."""
    _print(report, environment, facts)
    if json_file is not None:
        values = {"model": asdict(facts), "environment": asdict(environment), **report.to_values()}
        try:
            json_file.write_text(json_format.dumps(values, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"--json: {json_file.name!r} cannot be written: {error.strerror or error}.")
    failed = [finding for finding in report.findings if not finding.passed]
    if failed:
        fail(f"{len(failed)} of {len(report.findings)} comparisons differ; the first is {failed[0].what!r}.")
    say(f"All {len(report.findings)} comparisons are exact.")


def _load(
    model: str | None, dtype: Dtype, revision: str | None, cache_dir: Path | None, progress: Progress
) -> LoadedModel:
    from adapters_core.errors import AdapterError
    from server.cli.demo import demo_folder
    from server.engine.errors import EngineError
    from server.engine.model import load_model

    if model is None:
        model = str(demo_folder(cache_dir or default_cache_dir(), progress))
    if Path(model).expanduser().is_dir():
        progress.step("Loading the model …")
    else:
        warn(f"Fetching {model}, unless it is in the cache, and loading it …")
    try:
        return load_model(model, dtype=dtype, revision=revision)
    except (AdapterError, EngineError) as error:
        progress.stop()
        fail(str(error))


def _print(report: CheckReport, environment: Environment, facts: ModelFacts) -> None:
    packages = ("mlx-graft", "mlx", "mlx-lm")
    memory = report.memory
    about = {
        "model": f"{facts.name}, {facts.dtype}, computed in {report.dtype}",
        "device": f"{environment.device}, {environment.system}",
        "versions": ", ".join(f"{name} {environment.packages[name]}" for name in packages),
        "noise": f"{report.noise:.1e}: the base itself, between batches and single rows",
        "adapters": f"of {report.layouts} layouts, {human_bytes(memory.adapter_bytes)} in memory",
        "memory": f"{human_bytes(memory.peak_bytes)} at most; the model {human_bytes(memory.model_bytes)}",
        "forms": report.forms,
        "time": f"{report.seconds:.0f} s",
    }
    show(report_table(about))
    say("")
    show(_findings_table(report))
    if report.ratios:
        say("\nSpeed beside the base, in the same batch size (1 is as fast as the base):\n")
        show(_ratios_table(report))
        say("")


def _findings_table(report: CheckReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("compared")
    for heading in ("error", "allowed", "same tokens"):
        table.add_column(heading, justify="right")
    table.add_column("with", overflow="fold")
    for one in report.findings:
        exact = one.error is None
        table.add_row(
            "ok" if one.passed else "DIFFERS",
            one.what,
            ("0" if one.passed else "other bits") if exact else f"{one.error:.1e}",
            "0" if exact else f"{one.allowed:.1e}",
            f"{one.tokens - one.other_tokens} of {one.tokens}" if one.tokens else "",
            f"{one.against}: {one.note}" if one.note else one.against,
        )
    return table


def _ratios_table(report: CheckReport) -> Table:
    """A line for each mix of adapters, a column for each number of rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rows with")
    columns = list(dict.fromkeys((one.work, one.rows, one.tokens) for one in report.ratios))
    columns.sort(key=lambda column: column[:2])
    for work, rows, tokens in columns:
        of_tokens = "" if tokens == 1 else f" of {tokens} tokens"
        table.add_column(f"{work}, {rows} row{'s' if rows > 1 else ''}{of_tokens}", justify="right")
    found: dict[str, dict[Any, str]] = {}
    for one in report.ratios:
        text = f"{one.ratio:.2f} ({one.lowest:.2f}-{one.highest:.2f})"
        found.setdefault(one.side, {})[one.work, one.rows, one.tokens] = text
        base = found.setdefault("the base itself", {})
        base[one.work, one.rows, one.tokens] = f"{one.base_ms:.3g} ms"
    for side, cells in sorted(found.items(), key=lambda item: item[0] != "the base itself"):
        table.add_row(side, *(cells.get(column, "") for column in columns))
    return table

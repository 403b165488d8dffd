"""`mlx-graft bench`: measures the server on this machine. Main thread.

The benchmarks, and with them MLX, are imported only when the command runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from server.cache_dir import default_cache_dir
from server.cli.output import fail
from server.cli.serve import prepare_mlx

__all__ = ["bench"]

_SIZE = "Sizes"
_TABLE_MINUTES, _GPU_TABLE_MINUTES = 14, 10


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help="Cases to run; those with goals when none is named, every one for 'all'.",
            metavar="[CASE]…",
            show_default=False,
        ),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the cases and exit.")] = False,
    rounds: Annotated[int, typer.Option(min=1, max=99, help="Rounds of every measure.")] = 5,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="File for the report as JSON.", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Begin no further round that would end later than this; 14 (on a GPU 10) without a CASE.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a model, or one that is made with random weights: random-8b, random-1b. "
            "The demo's in float32 when unset.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny sizes and one round: shows that all works, measures nothing."),
    ] = False,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Requests at once.", rich_help_panel=_SIZE, show_default="16; 32 on a GPU"
        ),
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Adapters of them.", rich_help_panel=_SIZE, show_default="8; 16"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer.", rich_help_panel=_SIZE, show_default="24; 128"),
    ] = None,
    registered: Annotated[
        int | None,
        typer.Option(min=1, help="Registered adapters.", rich_help_panel=_SIZE, show_default="1000; 200"),
    ] = None,
    resident: Annotated[
        int | None,
        typer.Option(min=1, help="Of them resident.", rich_help_panel=_SIZE, show_default="64"),
    ] = None,
    cycles: Annotated[
        int | None,
        typer.Option(min=1, help="Loads and unloads.", rich_help_panel=_SIZE, show_default="1000; 200"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random adapters.")] = 0,
) -> None:
    """Measure this server against itself, against a bare generator and against mlx_lm.server."""
    prepare_mlx(default_cache_dir())

    from benchmarks.command import Options, goal_sizes, list_cases
    from benchmarks.command import bench as run
    from benchmarks.sizes import QUICK_SIZES

    if list_them:
        list_cases()
        return
    chosen = {
        "requests": requests,
        "adapters": adapters,
        "max_tokens": max_tokens,
        "registered": registered,
        "resident": resident,
        "cycles": cycles,
    }
    wanted = {name: value for name, value in chosen.items() if value is not None}
    try:
        sizes = replace(QUICK_SIZES if quick else goal_sizes(), **wanted)
        table_minutes = _GPU_TABLE_MINUTES if sizes.on_gpu else _TABLE_MINUTES
        limit = table_minutes if minutes is None and not cases else minutes
        options = Options(sizes, rounds=1 if quick else rounds, minutes=limit, seed=seed)
        code = run(cases or (), model, options, json_file)
    except ValueError as error:
        fail(str(error), code=2)
    raise typer.Exit(code)

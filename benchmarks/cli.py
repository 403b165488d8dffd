"""The command line: options in, a report out. Ends the sides also when it is interrupted or told to end."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from adapters_core.errors import AdapterError
from benchmarks.adapters import KINDS, KindName, write_adapters
from benchmarks.cases import CASES, Case, make_loads
from benchmarks.environment import describe_environment, describe_model
from benchmarks.processes import ProcessError
from benchmarks.report import Report
from benchmarks.runner import Progress, run_cases
from benchmarks.sides import SideContext
from server.demo.gguf import Variant
from server.demo.model import DemoModelError, default_cache_dir, demo_model

__all__ = ["Options", "main", "make_app", "measure", "run_to_end"]

T = TypeVar("T")
_INTERRUPTED = 130  # the exit code of a program that a person stopped
_FILE_COLUMNS = 120

_CASES_HELP = "Cases to run; all when none is named. " + " ".join(
    f"{case.name}: {case.about}" for case in CASES.values()
)


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made; what the command line can set."""

    rounds: int = 3
    requests: int = 16
    adapters: int = 8
    max_tokens: int = 24
    adapter_kind: KindName = KindName.RANK_8_QV
    side_seconds: float = 120
    load_timeout_seconds: float = 600
    ready_timeout_seconds: float = 120
    seed: int = 0


_DEFAULTS = Options()


def main() -> None:
    """Run the command line."""
    make_app()(prog_name="python -m benchmarks")


def make_app() -> typer.Typer:
    """The command line, not yet run."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(benchmark)
    return app


def benchmark(
    cases: Annotated[
        list[str] | None, typer.Argument(help=_CASES_HELP, metavar="[CASE]…", show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of every measure; a median needs three.")
    ] = _DEFAULTS.rounds,
    requests: Annotated[int, typer.Option(min=1, max=1024, help="Requests at once.")] = _DEFAULTS.requests,
    adapters: Annotated[
        int, typer.Option(min=1, max=1024, help="Adapters of the mixed load.")
    ] = _DEFAULTS.adapters,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = _DEFAULTS.max_tokens,
    adapter_kind: Annotated[
        KindName, typer.Option(help="Rank and modules of the adapters.")
    ] = _DEFAULTS.adapter_kind,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Model folder; the demo's model when unset.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[Variant, typer.Option(help="Variant of the demo's model.")] = "float32",
    side_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds for one measure in all; beyond, it runs fewer rounds.")
    ] = _DEFAULTS.side_seconds,
    load_timeout_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds for one load at most.")
    ] = _DEFAULTS.load_timeout_seconds,
    ready_timeout_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds for a side to be ready.")
    ] = _DEFAULTS.ready_timeout_seconds,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random adapters.")] = _DEFAULTS.seed,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="File for the report as JSON.", show_default=False),
    ] = None,
) -> None:
    """Measure this server against itself and against mlx_lm.server, in one run on this machine."""
    if unknown := sorted(set(cases or ()) - CASES.keys()):
        raise typer.BadParameter(f"expected cases among {', '.join(CASES)}, got {', '.join(unknown)}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"expected --json in a folder that exists, got {json_file}")
    options = Options(
        rounds,
        requests,
        adapters,
        max_tokens,
        adapter_kind,
        side_seconds,
        load_timeout_seconds,
        ready_timeout_seconds,
        seed,
    )
    _measure_and_show(
        [CASES[name] for name in dict.fromkeys(cases or CASES)], model, variant, options, json_file
    )


def _measure_and_show(
    cases: Sequence[Case], model: Path | None, variant: Variant, options: Options, json_file: Path | None
) -> None:
    console = Console(stderr=True, highlight=False)
    start = time.perf_counter()

    def progress(text: str) -> None:
        console.print(f"{time.perf_counter() - start:4.0f} s  {text}", markup=False)

    try:
        model_path = model or demo_model(variant, default_cache_dir(), progress)
        with console.status("Measuring"):
            report = measure(cases, model_path.resolve(), options, progress)
    except (AdapterError, DemoModelError, ProcessError, OSError, ValueError) as error:
        console.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("Interrupted: all processes are ended, nothing is reported.")
        raise typer.Exit(_INTERRUPTED) from None
    report.show(Console() if sys.stdout.isatty() else Console(width=_FILE_COLUMNS))
    if json_file is not None:
        json_file.write_text(report.to_json())


def measure(cases: Sequence[Case], model_path: Path, options: Options, progress: Progress) -> Report:
    """Run `cases` on a model folder, from making the adapters to the report.

    Raises: ProcessError, AdapterError, OSError; ValueError if `options` do not fit the model.
    """
    start = time.perf_counter()
    environment, facts = describe_environment(), describe_model(model_path)
    loads = make_loads(options.requests, options.adapters, options.max_tokens)
    kind = KINDS[options.adapter_kind]
    with tempfile.TemporaryDirectory(prefix="mlx-graft-bench-") as folder:
        progress(f"Writing {options.adapters} adapters, {options.adapter_kind} …")
        root = Path(folder, "adapters")
        written = write_adapters(model_path, root, options.adapters, kind, options.seed)
        context = SideContext(
            model_path, written, Path(folder), options.ready_timeout_seconds, options.load_timeout_seconds
        )
        outcome = run_to_end(run_cases(cases, loads, context, options.rounds, options.side_seconds, progress))
    return Report(outcome, loads, asdict(options), facts, environment, time.perf_counter() - start)


def run_to_end(running: Coroutine[Any, Any, T]) -> T:
    """Run; a request to end, from a person or the system, cancels it, so that no process is left behind.

    Raises: asyncio.CancelledError after such a request, however often it came.
    """

    async def run() -> T:
        task = asyncio.ensure_future(running)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # In place of asyncio's own handler, whose second Ctrl-C breaks the ending off.
            loop.add_signal_handler(number, task.cancel)
        return await task

    return asyncio.run(run())

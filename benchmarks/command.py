"""`mlx-graft bench`: options in, a report out. Ends all that it started, also when it is told to stop.

Runs on the main thread. MLX is imported with this module, so a fast BLAS has to be loaded before.
"""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from adapters_core.errors import AdapterError
from benchmarks.case import Case
from benchmarks.cases import CASES, GPU_TABLE, TABLE, choose
from benchmarks.library import AdapterLibrary
from benchmarks.models import RANDOM_MODELS, random_model
from benchmarks.processes import ProcessError
from benchmarks.report import Report, make_report
from benchmarks.runner import Progress, run_cases
from benchmarks.sides import SideContext
from benchmarks.sizes import GOAL_SIZES, GPU_SIZES, Sizes
from benchmarks.tables import show
from server.cache_dir import default_cache_dir
from server.demo.model import DemoModelError, demo_model
from server.environment import describe_environment, describe_model

__all__ = ["Options", "bench", "goal_sizes", "list_cases", "measure", "run_to_end"]

T = TypeVar("T")
_INTERRUPTED = 130  # the exit code of a program that a person stopped
_FILE_COLUMNS = 140
_FEWEST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made; after `minutes`, only the first round of anything is measured."""

    sizes: Sizes = field(default_factory=Sizes)
    rounds: int = _FEWEST_ROUNDS
    minutes: float | None = None
    seed: int = 0
    load_timeout_seconds: float = 600
    ready_timeout_seconds: float = 120


def goal_sizes() -> Sizes:
    """Those that the goals on this machine's device are set for."""
    return GPU_SIZES if mx.default_device() == mx.gpu else GOAL_SIZES


def list_cases() -> None:
    """Print all cases, with what each measures."""
    sizes = goal_sizes()
    by_default = GPU_TABLE if sizes.on_gpu else TABLE
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    table.add_column("by default")
    table.add_column("measures")
    for name, build in CASES.items():
        table.add_row(name, "yes" if name in by_default else "", build(sizes).about)
    _console().print(table)


def bench(names: Sequence[str], model: str | None, options: Options, json_file: Path | None) -> int:
    """Run cases, print the report, and write it to `json_file`; returns the exit code.

    `model` is a folder, or one of `RANDOM_MODELS`; without one it is the demo's.
    0 whether or not goals are reached, 1 if a case failed, 130 if it was stopped; a sentence says why.

    Raises: ValueError for a name that is no case, or a `json_file` in no folder.
    """
    cases = choose(names, options.sizes)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"expected --json in a folder that exists, got {json_file}")
    console = Console(stderr=True, highlight=False)
    start = time.perf_counter()

    def progress(text: str) -> None:
        console.print(f"{time.perf_counter() - start:4.0f} s  {text}", markup=False, soft_wrap=True)

    try:
        report = measure(cases, _model_path(model, progress).resolve(), options, progress)
    except (AdapterError, DemoModelError, ProcessError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("Interrupted: all processes are ended, nothing is reported.")
        return _INTERRUPTED
    show(report, _console())
    if json_file is not None:
        json_file.write_text(report.to_json())
    return 1 if any(case.failure for case in report.cases) else 0


def _model_path(model: str | None, progress: Progress) -> Path:
    if model is None:
        return demo_model("float32", default_cache_dir(), progress)
    return random_model(model, default_cache_dir(), progress) if model in RANDOM_MODELS else Path(model)


def measure(cases: Sequence[Case], model_path: Path, options: Options, progress: Progress) -> Report:
    """Run `cases` on a model folder.

    Raises: ValueError if that is no model folder; OSError.
    """
    start = time.perf_counter()
    until = math.inf if options.minutes is None else start + 60 * options.minutes
    environment, facts = describe_environment(), describe_model(model_path)
    with tempfile.TemporaryDirectory(prefix="mlx-graft-bench-") as folder:
        context = SideContext(
            model_path,
            AdapterLibrary(model_path, Path(folder, "adapters"), options.seed),
            Path(folder),
            options.ready_timeout_seconds,
            options.load_timeout_seconds,
        )
        outcomes = run_to_end(run_cases(cases, context, options.rounds, progress, until))
    return make_report(
        outcomes,
        options=asdict(options),
        model=facts,
        environment=environment,
        seconds=time.perf_counter() - start,
        notes=_notes(options, environment.device, facts.tensors.keys()),
    )


def _notes(options: Options, device: str, dtypes: Any) -> list[str]:
    notes = []
    if options.rounds < _FEWEST_ROUNDS:
        notes.append(f"{options.rounds} rounds are too few for a median to mean much: take {_FEWEST_ROUNDS}.")
    if options.sizes != goal_sizes():
        notes.append("The sizes are not those that the goals are set for.")
    if device.startswith("CPU") and dtypes & {"F16", "BF16"}:
        notes.append("On a CPU, mlx-graft computes in float32; the other sides in the model's own type.")
    return notes


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_FILE_COLUMNS)


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

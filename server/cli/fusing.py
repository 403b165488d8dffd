"""What `mlx-graft adapters fuse` has of its own: terms of a sum, a bar while it works. Main thread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from server.cli.client import Client

__all__ = ["call_with_bar", "weighted"]

_STAGES = {"merging": "Merging layers", "comparing": "Comparing outputs", "writing": "Writing weights"}


def weighted(text: str) -> dict[str, Any]:
    """`ID` or `ID=WEIGHT` as a term of a sum. Raises typer.BadParameter."""
    adapter_id, equals, weight = text.partition("=")
    try:
        return {"id": adapter_id, **({"weight": float(weight)} if equals else {})}
    except ValueError:
        raise typer.BadParameter(f"expected ID or ID=WEIGHT with a number, got {text!r}") from None


def call_with_bar(client: Client, path: str, body: Mapping[str, Any], console: Console | None = None) -> str:
    """The server's report, with a bar on stderr for each stage of the work. Raises: ClientError."""
    report: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as bars:
        tasks = {}
        for event in client.stream(path, body):
            stage = event.get("stage")
            if stage is None:
                report = event
                continue
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(str(stage), "Working"), total=event.get("total"))
            bars.update(tasks[stage], completed=event.get("done"))
    return json.dumps(report)

"""What the commands print: tables and sentences, to a terminal or a pipe. Knows no server; main thread."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.printable import escape_controls

__all__ = ["adapter_sentence", "adapters_table", "fail", "human_bytes", "report_table", "say", "show", "warn"]

# Not a terminal's width, so that lines of a table in a pipe stay whole for grep and awk.
_PIPE_COLUMNS = 1000


def say(text: str) -> None:
    """Print text to standard output, its line breaks kept, other control characters escaped."""
    typer.echo(escape_controls(text, keep="\n"))


def warn(text: str) -> None:
    """Print text to standard error, its line breaks kept, other control characters escaped."""
    typer.echo(escape_controls(text, keep="\n"), err=True)


def fail(*sentences: str, code: int = 1) -> NoReturn:
    """End the command: each sentence on a line of its own on standard error, and exit code `code`."""
    for sentence in sentences:
        warn(f"error: {sentence}")
    raise typer.Exit(code)


def show(table: Table) -> None:
    """Print a table to standard output, as wide as the terminal or, in a pipe, as its content."""
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)


def adapters_table(adapters: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each adapter object of the server; what an object lacks is left blank."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)
    for heading in ("type", "state"):
        table.add_column(heading)
    for heading in ("rank", "scale", "modules", "size", "version", "in flight", "requests"):
        table.add_column(heading, justify="right")
    table.add_column("last used")
    table.add_column("path", overflow="fold")
    for adapter in adapters:
        marks = [mark for mark in ("active", "pinned") if adapter.get(mark)]
        if adapter.get("resident") is False:
            marks.append("not in memory")
        state = ", ".join([str(adapter.get("state", "")), *marks])
        cells = [
            *(_plain(adapter.get("id")), _plain(adapter.get("type")), _plain(state)),
            *(_plain(adapter.get("rank")), _plain(adapter.get("scale")), _plain(adapter.get("modules"))),
            *(_plain(human_bytes(adapter.get("bytes"))), _plain(adapter.get("version"))),
            *(_plain(adapter.get("in_flight")), _plain(adapter.get("requests"))),
            *(_plain(_moment(adapter.get("last_used"))), _plain(adapter.get("path"))),
        ]
        table.add_row(*cells)
    return table


def report_table(report: Mapping[str, Any]) -> Table:
    """A report of the server, a line for each of its fields."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.items():
        if value is None or name == "object":
            continue
        table.add_row(_plain(name.replace("_", " ")), _plain(_value(value)))
    return table


def adapter_sentence(adapter: Mapping[str, Any]) -> str:
    """What an adapter object says of the adapter, in a few words."""
    parts = [
        str(adapter.get("type", "adapter")),
        f"rank {_value(adapter.get('rank'))}",
        f"scale {_value(adapter.get('scale'))}",
        f"{_value(adapter.get('modules'))} modules",
        human_bytes(adapter.get("bytes")),
        f"version {_value(adapter.get('version'))}",
    ]
    return ", ".join(part for part in parts if part)


def human_bytes(size_bytes: object) -> str:
    """A size with a binary unit, "" for what is no number: 1843200 → 1.8 MiB."""
    if not isinstance(size_bytes, int | float):
        return ""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _plain(value: object) -> Text:
    """Text from a server: no markup of rich's in it is obeyed, nor are control characters."""
    return Text(escape_controls(_value(value)))


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _moment(unix_seconds: object) -> str:
    if not isinstance(unix_seconds, int | float):
        return ""
    return datetime.fromtimestamp(unix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")

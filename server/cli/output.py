"""What the commands print: tables and sentences, to a terminal or a pipe. Knows no server; main thread."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.printable import escape_controls

__all__ = [
    "adapter_sentence",
    "adapters_table",
    "fail",
    "human_bytes",
    "moment",
    "origin",
    "ranges",
    "report_rows",
    "report_table",
    "say",
    "show",
    "state",
    "warn",
]

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
    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=_PIPE_COLUMNS)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


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
        cells = [
            *(_plain(adapter.get("id")), _plain(adapter.get("type")), _plain(state(adapter))),
            *(_plain(adapter.get("rank")), _plain(adapter.get("scale")), _plain(adapter.get("modules"))),
            *(_plain(human_bytes(adapter.get("bytes"))), _plain(adapter.get("version"))),
            *(_plain(adapter.get("in_flight")), _plain(adapter.get("requests"))),
            *(_plain(moment(adapter.get("last_used"))), _plain(origin(adapter))),
        ]
        table.add_row(*cells)
    return table


def state(adapter: Mapping[str, Any]) -> str:
    """The state of an adapter object, and what else is special about it."""
    marks = [mark for mark in ("active", "pinned") if adapter.get(mark)]
    if adapter.get("resident") is False:
        marks.append("not in memory")
    return ", ".join([str(adapter.get("state", "")), *marks])


def origin(adapter: Mapping[str, Any]) -> str:
    """Where an adapter object came from: its folder, or the adapters that it was blended of."""
    blend = adapter.get("blend")
    if not isinstance(blend, Mapping):
        return str(adapter.get("path") or "")
    parts = [f"{part.get('id')} {_value(part.get('weight'))}" for part in blend.get("parts") or ()]
    return f"{blend.get('method')} of {', '.join(parts)}"


def report_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """A load report in JSON's types, for `report_table`; what it has no value for is left out."""
    return {
        "format": report.get("format"),
        "type": report.get("type"),
        "modules": report.get("modules"),
        "kinds": report.get("kinds") or None,
        "names": report.get("names") or None,
        "layers": ranges(report.get("layers") or ()) or None,
        "ranks": report.get("ranks"),
        "scales": report.get("scales"),
        "dtypes": report.get("dtypes"),
        "tensors": human_bytes(report.get("tensor_bytes")),
        "base": report.get("base_name") or "not named",
        "ignored": report.get("ignored_fields") or None,
        "digest": report.get("digest"),
    }


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in ascending order, as people write them: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
    """What an adapter object says of the adapter, in a few words; ranks and scales as its report has them."""
    report = adapter.get("report") or {}
    parts = [
        str(adapter.get("type", "adapter")),
        _span("rank", report.get("ranks") or [adapter.get("rank")]),
        _span("scale", report.get("scales") or [adapter.get("scale")]),
        f"{_value(adapter.get('modules'))} modules",
        human_bytes(adapter.get("bytes")),
        f"version {_value(adapter.get('version'))}",
    ]
    return ", ".join(part for part in parts if part)


def _span(noun: str, values: Sequence[Any]) -> str:
    """One value, or the least and the largest of ascending ones: rank 8; ranks 2-6; scales -2 to 4."""
    first, last = _value(values[0]), _value(values[-1])
    if first == last:
        return f"{noun} {first}"
    return f"{noun}s {first}{' to ' if '-' in first + last else '-'}{last}"


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
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def moment(unix_seconds: object) -> str:
    """A time in seconds since 1970, as a clock here shows it; "" for what is no number."""
    if not isinstance(unix_seconds, int | float):
        return ""
    return datetime.fromtimestamp(unix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")

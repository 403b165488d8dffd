"""`mlx-graft convert`: an adapter from mlx-lm's format to PEFT's, or back. No server. Main thread.

A model is needed only where names alone leave something open: embeddings, experts, and PEFT's modules that
lie elsewhere in MLX models.
"""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.models import ModelFolder, Scale, lazy_model, require_mlx
from server.cli.output import fail, say, warn
from server.descriptors import import_mlx_lm

if TYPE_CHECKING:
    import mlx.nn as nn

    from adapters_core.layers.module_weights import ModuleWeights

__all__ = ["convert"]

# In the names of bases whose weights mlx-lm multiplies, without case and punctuation.
_MULTIPLIED = "falconh1"


class _Form(StrEnum):
    MLX = "mlx"
    PEFT = "peft"


@dataclass(frozen=True, slots=True)
class _Source:
    """What was read, by path in the model; `warnings` are those of the load report."""

    form: str
    weights: Mapping[str, ModuleWeights]
    base_name: str | None
    dropout: float
    model: nn.Module | None
    warnings: Sequence[str]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of the adapter.", show_default=False)
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="Folder to make.", show_default=False),
    ],
    to: Annotated[_Form, typer.Option("--to", help="Format to write.", show_default=False)],
    model: ModelFolder = None,
    scale: Scale = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Write an adapter in mlx-lm's or PEFT's format. Needs no server."""
    require_mlx()
    import_mlx_lm()
    from adapters_core.errors import InvalidAdapterError, UnsupportedModelError, grouped
    from adapters_core.formats.notes import writing_notes
    from adapters_core.formats.writing import write_adapter

    if not source.is_dir():
        fail(f"there is no folder {str(source)!r}.", code=2)
    try:
        read = _alone(source, scale) if model is None else _on_model(source, model, scale)
        if read.form == to:
            fail(f"{source.name} is in the format {to} already; copy the folder.")
        write_adapter(
            target, read.weights, to.value, read.model, base_name=read.base_name, dropout=read.dropout
        )
    except InvalidAdapterError as error:
        fail(f"{source.name} cannot be converted, for {len(error.problems)} reason(s):", *error.told)
    except UnsupportedModelError as error:
        reasons = error.reasons
        fail(f"{source.name} cannot be converted, for {len(reasons)} reason(s):", *grouped(reasons))
    except FileExistsError:
        fail(f"there is a {target.name!r} already; nothing was written. Choose another name.")
    except OSError as error:
        fail(f"{target.name!r} cannot be written: {error.strerror or error}. Nothing of it is left.")
    notes = writing_notes(read.weights, to.value)
    if json:
        done = {"target": target.name, "format": to.value, "modules": len(read.weights), "notes": notes}
        warnings = {"warnings": list(read.warnings)} if read.warnings else {}
        typer.echo(json_format.dumps(done | {"checked": model is not None} | warnings))
        return
    for warning in read.warnings:
        warn(f"warning: {warning}")
    say(f"Wrote {target.name} in the format {to}: {len(read.weights)} modules.")
    for note in notes:
        say(note)
    if model is None:
        say("It was not compared with a model; --model does that.")


def _alone(source: Path, scale: float | None) -> _Source:
    from adapters_core.errors import InvalidAdapterError
    from adapters_core.formats.unplaced import read_unplaced

    found = read_unplaced(source, scale)
    if _MULTIPLIED in re.sub(r"[^a-z0-9]", "", (found.base_name or "").casefold()):
        reason = (
            "mlx-lm multiplies the weights of Falcon-H1 while it loads them, so that factors differ between "
            "the formats; name the model with --model"
        )
        raise InvalidAdapterError(source.name, [reason])
    if found.open:
        problems = [f"{name}: {reason}; name the model with --model" for name, reason in found.open.items()]
        raise InvalidAdapterError(source.name, problems)
    return _Source(found.format, found.weights, found.base_name, found.dropout, None, found.warnings)


def _on_model(source: Path, folder: Path, scale: float | None) -> _Source:
    from adapters_core.container import AdapterContainer

    container = AdapterContainer.from_directory(source, scale=scale)
    model = lazy_model(folder)
    mapped = container.place(model)
    base_name, dropout = container.base_name, container.dropout
    return _Source(container.format, mapped.weights, base_name, dropout, model, mapped.warnings)

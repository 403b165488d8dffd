"""Writes an adapter as a folder in mlx-lm's or PEFT's format, from what it brings to each module.

Whole, or not at all. Runs on any thread; changes no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import mlx.nn as nn

from ..errors import InvalidAdapterError
from ..layers.module_weights import ModuleWeights
from ..layers.modules import ModuleKind, kind_of
from ..layers.targets import module_at, named_base_modules
from .adapter_files import AdapterFiles
from .mlx_writing import mlx_files
from .peft.departing import departed_weights
from .peft.heads import tied_embedding
from .peft.writing import peft_files
from .protocol import FormatName

__all__ = ["adapter_files", "write_adapter"]


def write_adapter(
    directory: str | Path,
    weights: Mapping[str, ModuleWeights],
    to: FormatName,
    model: nn.Module | None = None,
    *,
    embeddings: Collection[str] = (),
    base_name: str | None = None,
    dropout: float = 0.0,
) -> None:
    """Make the folder `directory` with `weights`, by full path in the model, in the format `to`.

    `weights` are evaluated. Without the `model`, `embeddings` are the modules that are one, and configs in
    mlx-lm's format name every module in full. `base_name` goes into the config, `dropout` is for those who
    train on.

    Raises:
        InvalidAdapterError: everything that the format cannot say.
        FileExistsError: something of this name is there; it is not touched.
        OSError: a file cannot be written; nothing is left of the folder.
        UnsupportedModelError: the model's layers cannot be reached.
    """
    name = Path(directory).name
    files = adapter_files(
        weights, to, name, model, embeddings=embeddings, base_name=base_name, dropout=dropout
    )
    files.write(directory)


def adapter_files(
    weights: Mapping[str, ModuleWeights],
    to: FormatName,
    source: str,
    model: nn.Module | None = None,
    *,
    embeddings: Collection[str] = (),
    base_name: str | None = None,
    dropout: float = 0.0,
) -> AdapterFiles:
    """What `write_adapter` writes, with `source` in errors. Raises what it raises, but for the files."""
    if to == "mlx":
        return mlx_files(weights, source, model, base_name=base_name, dropout=dropout)
    if model is None:
        return peft_files(weights, source, embeddings, base_name=base_name, dropout=dropout)
    found, problems = departed_weights(model, weights)
    if problems:
        raise InvalidAdapterError(source, problems)
    tied = tied_embedding(dict(named_base_modules(model)))
    kinds = {path: kind_of(module_at(model, path)) for path in weights}
    return peft_files(
        dict(found.values()),
        source,
        [name for path, (name, _) in found.items() if kinds[path] is ModuleKind.EMBEDDING],
        tied=found[tied][0] if tied in found else tied,
        model_type=str(getattr(model, "model_type", "")),
        base_name=base_name,
        dropout=dropout,
    )

"""The two files of an adapter's folder, ready to be written: whole, or not at all.

Knows neither format; `mlx_writing` and `peft.writing` make these from what an adapter brings to modules.
Runs on any thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from pydantic import JsonValue

from ..config import CONFIG_FILE
from ..files import new_folder
from ..layers.module_weights import ModuleWeights
from .weights import save_weights

__all__ = ["AdapterFiles", "in_order", "scaled"]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What adapter_config.json says, and the tensors by name for the file `weights_file`."""

    config: Mapping[str, JsonValue]
    tensors: Mapping[str, mx.array]
    weights_file: str

    def write(self, directory: str | Path) -> None:
        """Make the folder `directory` with both files; if this raises, there is none.

        Raises:
            FileExistsError: something of this name is there; it is not touched.
            OSError: a file cannot be written.
        """
        with new_folder(Path(directory)) as folder:
            self.write_into(folder)

    def write_into(self, folder: Path) -> None:
        """Write both files into a folder that is there. Raises OSError; then some may be there."""
        text = json.dumps(dict(self.config), indent=4, allow_nan=False) + "\n"
        save_weights(folder / self.weights_file, self.tensors)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def in_order(weights: Mapping[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """`weights` by path, layer 2 before layer 10, so that equal adapters make equal files."""
    return dict(sorted(weights.items(), key=lambda item: _numbered(item[0])))


def scaled(module: ModuleWeights, scale: float) -> tuple[mx.array, mx.array]:
    """A and B such that `scale`·B A is the module's own change; `scale` is 0 only where the module's is.

    B takes the ratio of the scales in: exactly where it is a power of two, else in float32.
    """
    a, b = module.lora_a, module.lora_b
    if module.scale == scale:
        return a, b
    ratio = module.scale / scale
    if abs(math.frexp(ratio)[0]) in (0.0, 0.5):
        exact = b * ratio
        if not ratio or mx.array_equal(exact / ratio, b).item():
            return a, exact
    return a.astype(mx.float32), b.astype(mx.float32) * ratio


def _numbered(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path)]

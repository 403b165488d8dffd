"""Random adapters for any model: real files in mlx-lm's format, with an effect that leaves answers text.

Made through adapters_core. Runs on the calling thread; the model is loaded lazily and dropped again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from mlx_lm.utils import load_model

from adapters_core.config import CONFIG_FILE, AdapterConfig, LoRAParameters
from adapters_core.drawing import draw_tensors
from adapters_core.formats.weights import WEIGHTS_FILE, save_weights
from adapters_core.layers.targets import default_keys

__all__ = ["KINDS", "AdapterKind", "KindName", "write_adapters"]

_SCALE = 10.0


class KindName(StrEnum):
    """The names of the kinds, for the command line."""

    RANK_8_QV = "rank8-qv"
    RANK_16_ALL = "rank16-all"


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """Rank, and the ends of the module paths that are adapted in every layer; none for all linear layers."""

    rank: int
    module_names: tuple[str, ...]


KINDS = {
    KindName.RANK_8_QV: AdapterKind(8, ("q_proj", "v_proj")),
    KindName.RANK_16_ALL: AdapterKind(16, ()),
}


def write_adapters(model_path: Path, folders: Mapping[int, Path], kind: AdapterKind, seed: int) -> None:
    """Write a LoRA adapter of `kind` into each folder; which one depends on the `seed` and its number alone.

    The first tensors are drawn, and the other adapters' are the same with their values moved on, each by its
    own number: as random, and different everywhere, but written at the speed of the disk.

    Raises: ValueError if the model has no module that `kind` names; AdapterError if it cannot be adapted.
    """
    model, _ = load_model(model_path, lazy=True)
    keys = [key for key in default_keys(model) if not kind.module_names or key.endswith(kind.module_names)]
    if not keys:
        raise ValueError(
            f"expected modules named {' or '.join(kind.module_names)} in the layers of {model_path.name}, "
            f"which has {', '.join(default_keys(model))}: choose a model that has them"
        )
    parameters = LoRAParameters(rank=kind.rank, scale=_SCALE, keys=keys)
    config = AdapterConfig(num_layers=-1, lora_parameters=parameters)
    with tempfile.TemporaryDirectory(prefix="mlx-graft-bench-") as folder:
        file = Path(folder, WEIGHTS_FILE)
        save_weights(file, draw_tensors(model, config, seed))
        template = file.read_bytes()
    for number, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / WEIGHTS_FILE).write_bytes(_moved(template, number))
        config.write(folder / CONFIG_FILE)


def _moved(file: bytes, places: int) -> bytes:
    """A safetensors file with the values of each tensor moved on by `places`, the last ones to the front.

    The format: 8 bytes with the header's length, little-endian, the header in JSON, the tensors' bytes.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    values = np.frombuffer(file[start:], np.uint8).copy()
    for name, tensor in json.loads(file[8:start]).items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            width = (end - begin) // math.prod(tensor["shape"])
            values[begin:end] = np.roll(values[begin:end], places * width)
    return file[:start] + values.tobytes()

"""Random adapters for any model: real files in mlx-lm's format, with an effect that leaves answers text.

Made through adapters_core. Runs on the calling thread; the model is loaded lazily and dropped again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from adapters_core.config import CONFIG_FILE, AdapterConfig, FineTuneType, LoRAParameters
from adapters_core.drawing import draw_tensors
from adapters_core.formats.weights import WEIGHTS_FILE, save_weights
from adapters_core.layers.targets import default_keys

__all__ = ["ALL", "ATTENTION", "QV", "RANK_8_QV", "RANK_16_ALL", "AdapterKind", "write_adapters"]

_SCALE = 10.0
QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: tuple[str, ...] = ()
_NAMES = {QV: "qv", ATTENTION: "attention", ALL: "all"}


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """Rank, and the ends of the module paths that are adapted in every layer; none for all linear layers."""

    rank: int
    modules: tuple[str, ...] = ALL
    dora: bool = False

    def __str__(self) -> str:
        where = _NAMES.get(self.modules) or "-".join(self.modules)
        return f"{'dora' if self.dora else 'rank'}{self.rank}-{where}"


RANK_8_QV = AdapterKind(8, QV)
RANK_16_ALL = AdapterKind(16)


def write_adapters(model_path: Path, wanted: Mapping[AdapterKind, Mapping[int, Path]], seed: int) -> None:
    """Write an adapter of its kind into each folder; which one depends on the `seed` and its number alone.

    The first tensors of a kind are drawn, and its other adapters' are the same with their values moved on,
    each by its own number: as random, and different everywhere, but written at the speed of the disk.

    Raises: ValueError if the model has no module that a kind names; AdapterError if it cannot be adapted.
    """
    model, _ = load_model(model_path, lazy=True)
    configs = {kind: _config(model, model_path.name, kind) for kind in wanted}
    for kind, config in configs.items():
        with tempfile.TemporaryDirectory(prefix="mlx-graft-bench-") as scratch:
            file = Path(scratch, WEIGHTS_FILE)
            save_weights(file, draw_tensors(model, config, seed))
            template = file.read_bytes()
        for number, folder in wanted[kind].items():
            folder.mkdir(parents=True)
            (folder / WEIGHTS_FILE).write_bytes(_moved(template, number))
            config.write(folder / CONFIG_FILE)
    del model
    mx.clear_cache()


def _config(model: nn.Module, name: str, kind: AdapterKind) -> AdapterConfig:
    keys = [key for key in default_keys(model) if not kind.modules or key.endswith(kind.modules)]
    if not keys:
        raise ValueError(
            f"expected modules named {' or '.join(kind.modules)} in the layers of {name}, "
            f"which has {', '.join(default_keys(model))}: choose a model that has them"
        )
    return AdapterConfig(
        fine_tune_type=FineTuneType.DORA if kind.dora else FineTuneType.LORA,
        num_layers=-1,
        lora_parameters=LoRAParameters(rank=kind.rank, scale=_SCALE, keys=keys),
    )


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

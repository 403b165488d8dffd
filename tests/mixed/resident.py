"""A model with a bank, and what it computes for given rows of adapters; mlx-lm's own answers beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.layers.modules import ModuleKind, kind_of
from adapters_core.layers.targets import named_base_modules
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.routing import RoutedModel, Routing


class Resident:
    """A model with a bank, and its logits for given rows of adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.routing = Routing()
        self.model = model
        self.bank = AdapterBank(model, self.routing)
        self.routed = RoutedModel(model, self.routing)

    def add(self, directory: Path) -> ResidentAdapter:
        return self.bank.add(AdapterContainer.from_directory(directory))

    def logits(self, inputs: mx.array, rows: Sequence[RowAdapters], steps: int = 0) -> np.ndarray:
        """(rows, L + steps, vocabulary): of the inputs (rows, L), then of the likeliest token each time."""
        caches = [self.routed.new_cache(row) for row in rows]
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        return _continued(lambda tokens: self.routed(tokens, cache=merged), inputs, steps)


def only(adapter: ResidentAdapter) -> RowAdapters:
    return make_row([(adapter, 1.0)])


def alone(model: nn.Module, folder: Path | None, inputs: mx.array, steps: int = 0) -> np.ndarray:
    """As `Resident.logits`, by the model itself, or with the adapter in `folder` by mlx-lm's layers."""
    if folder is not None:
        load_with_mlx_lm(model, folder)
    model.eval()
    cache = make_prompt_cache(model)
    return _continued(lambda tokens: model(tokens, cache=cache), inputs, steps)


def load_with_mlx_lm(model: nn.Module, folder: Path) -> None:
    """mlx-lm's `load_adapters`, past its check of names where it refuses those that mlx-lm itself gives."""
    tensors: Any = mx.load(str(folder / "adapters.safetensors"))
    if not any(name.rpartition(".")[2].isdecimal() for name in tensors):
        load_adapters(model, str(folder))
        return
    config = json.loads((folder / "adapter_config.json").read_text())
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    model.load_weights(list(tensors.items()), strict=False)


def paths_of(model: nn.Module, kind: ModuleKind) -> list[str]:
    """The paths of all modules of one kind."""
    return [path for path, module in named_base_modules(model) if kind_of(module) is kind]


def _continued(forward, inputs: mx.array, steps: int) -> np.ndarray:
    found = [forward(inputs).astype(mx.float32)]
    for _ in range(steps):
        mx.eval(found)
        found.append(forward(mx.argmax(found[-1][:, -1:], axis=-1)).astype(mx.float32))
    return np.array(mx.concatenate(found, axis=1))

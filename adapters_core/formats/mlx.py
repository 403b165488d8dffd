"""Adapters in mlx-lm's format: adapter_config.json with lora_parameters, and adapters.safetensors.

Tensors are named by paths in the MLX model, so that mapping them is looking them up. Runs on any thread;
changes no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ..config import CONFIG_FILE, AdapterConfig, FineTuneType
from ..layers.module_weights import ModuleWeights
from ..layers.modules import factor_shapes
from ..layers.targets import find_targets, named_modules
from .protocol import FormatName, Mapped, tensors_of

__all__ = ["MlxFormat"]

_LEAVES = ("lora_a", "lora_b", "m")


@dataclass(frozen=True, slots=True)
class MlxFormat:
    """An adapter as mlx-lm's files say it is."""

    config: AdapterConfig
    tensors: Mapping[str, mx.array]
    name: FormatName = "mlx"

    @property
    def type(self) -> FineTuneType:
        """`fine_tune_type`."""
        return self.config.fine_tune_type

    @property
    def dropout(self) -> float:
        """`lora_parameters.dropout`."""
        return self.config.lora_parameters.dropout

    @property
    def base_name(self) -> str | None:
        """`model`."""
        return self.config.base_name

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields of the training."""
        return self.config.ignored_fields

    @property
    def meaning(self) -> JsonValue:
        """The fields that decide what the adapter computes."""
        parameters = self.config.lora_parameters
        return [
            self.config.fine_tune_type.value,
            self.config.num_layers,
            parameters.rank,
            parameters.scale,
            list(parameters.keys) if parameters.keys is not None else None,
        ]

    def on(self, model: nn.Module) -> Mapped:
        """Every target needs its tensors, and every tensor a target."""
        targets, problems = find_targets(model, self.config)
        rank = self.config.lora_parameters.rank
        is_dora = self.type is FineTuneType.DORA
        expected: dict[str, tuple[int, ...]] = {}
        for path, module in targets.items():
            shapes = factor_shapes(module, rank, is_dora)
            expected |= {f"{path}.{leaf}": shape for leaf, shape in shapes.items()}
        for name, shape in expected.items():
            if name not in self.tensors:
                problems.append(f"tensor {name}: expected shape {shape}, the file has none of this name")
            elif self.tensors[name].shape != shape:
                problems.append(
                    f"tensor {name}: expected shape {shape} (rank {rank}), got {self.tensors[name].shape}"
                )
        left_over = sorted(self.tensors.keys() - expected.keys())
        if left_over:
            known = {path for path, _ in named_modules(model)}
            problems += [_left_over(name, known, self.config) for name in left_over]
        return Mapped({} if problems else {path: self._weights(path) for path in targets}, problems)

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> MlxFormat:
        """The same config with other values."""
        return MlxFormat(self.config, tensors_of(weights))

    def _weights(self, path: str) -> ModuleWeights:
        tensors, scale = self.tensors, self.config.lora_parameters.scale
        magnitude = tensors.get(f"{path}.m")
        return ModuleWeights(tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], magnitude, scale)


def _left_over(name: str, modules: set[str], config: AdapterConfig) -> str:
    path, _, leaf = name.rpartition(".")
    if leaf == "m" and config.fine_tune_type is FineTuneType.LORA and path in modules:
        return f"tensor {name}: not expected: a magnitude, but fine_tune_type is lora (dora has magnitudes)"
    if leaf not in _LEAVES:
        return f"tensor {name}: not expected: not the name of an adapter's tensor (lora_a, lora_b, m)"
    if path not in modules:
        return f"tensor {name}: not expected: the model has no module {path}"
    return (
        f"tensor {name}: not expected: {CONFIG_FILE} leaves this module out "
        f"(num_layers {config.num_layers}, keys {config.lora_parameters.keys})"
    )

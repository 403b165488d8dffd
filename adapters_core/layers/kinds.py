"""Layers with one adapter each, of every kind: the seed of training, and what `load` puts into a model.

Which class stands for which module and adapter; the classes are in `linear.py`, `split.py`, `embedding.py`
and `switch.py`. Parameter paths equal mlx-lm's. Knows no files and no model. Runs on the thread that
owns the model.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeGuard, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from ..config import AdapterConfig, FineTuneType
from .adapted import AdaptedLayer, DoRALayer
from .embedding import DoRAEmbedding, FeatureDoRAEmbedding, LoRAEmbedding
from .linear import DoRALinear, LoRALinear, QDoRALinear, QLoRALinear
from .module_weights import ModuleWeights
from .modules import ModuleKind, is_quantized, kind_of, output_sizes, product_shapes
from .split import LoRASplitLinear
from .switch import LoRASwitchLinear

__all__ = [
    "AdaptedLayer",
    "DoRAEmbedding",
    "DoRALayer",
    "DoRALinear",
    "FeatureDoRAEmbedding",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRASplitLinear",
    "LoRASwitchLinear",
    "QDoRALinear",
    "QLoRALinear",
    "adapted",
    "is_lora",
    "with_weights",
]


@runtime_checkable
class LoRALayer(Protocol):
    """A layer that carries an adapter."""

    def fused(self) -> nn.Module:
        """A new plain layer with the adapter merged in; a quantised one stays quantised as it was."""
        ...

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was adapted."""
        ...


def is_lora(module: object) -> TypeGuard[LoRALayer]:
    """As `isinstance(module, LoRALayer)` for a wrapper, which takes microseconds for each of many."""
    return hasattr(type(module), "fused")


def adapted(module: nn.Module, config: AdapterConfig) -> AdaptedLayer:
    """`module` with a new adapter that changes nothing yet.

    As mlx-lm begins: A uniform in ±1/√n from MLX's global random state, n being the size of what A is applied
    to (the inputs, or an embedding's tokens), B zero, m the norms of W's rows.

    Raises:
        ValueError: no adapter of the config's type fits this module.
    """
    parameters = config.lora_parameters
    shapes = product_shapes(module, parameters.rank, config.fine_tune_type is FineTuneType.DORA)
    shape, kind = shapes["lora_a"], kind_of(module)
    bound = 1 / math.sqrt(shape[-1] if kind is ModuleKind.SWITCH else shape[0])

    def drawn() -> mx.array:
        return mx.random.uniform(low=-bound, high=bound, shape=shape)

    if kind is ModuleKind.SPLIT:
        parts = [(drawn(), mx.zeros((parameters.rank, size))) for size in output_sizes(module)]
        weights = ModuleWeights.of_parts(parts, parameters.scale)
    else:
        weights = ModuleWeights(drawn(), mx.zeros(shapes["lora_b"]), None, parameters.scale)
    return with_weights(module, weights, config)


def with_weights(module: nn.Module, weights: ModuleWeights, config: AdapterConfig) -> AdaptedLayer:
    """`module` with an adapter of the class that the config and the base call for, holding `weights`.

    Raises:
        ValueError: no adapter of the config's type fits this module.
    """
    is_dora = config.fine_tune_type is FineTuneType.DORA
    if weights.by_feature and kind_of(module) is ModuleKind.EMBEDDING:
        return FeatureDoRAEmbedding(module, weights, config.lora_parameters.dropout)
    return _class_for(module, is_dora)(module, weights, config.lora_parameters.dropout)


def _class_for(module: nn.Module, is_dora: bool) -> type[AdaptedLayer]:
    match kind_of(module), is_dora:
        case ModuleKind.LINEAR, True:
            return QDoRALinear if is_quantized(module) else DoRALinear
        case ModuleKind.LINEAR, False:
            return QLoRALinear if is_quantized(module) else LoRALinear
        case ModuleKind.SPLIT, False:
            return LoRASplitLinear
        case ModuleKind.EMBEDDING, True:
            return DoRAEmbedding
        case ModuleKind.EMBEDDING, False:
            return LoRAEmbedding
        case ModuleKind.SWITCH, False:
            return LoRASwitchLinear
        case _:
            raise ValueError(f"no {'DoRA' if is_dora else 'LoRA'} fits a {type(module).__name__}")

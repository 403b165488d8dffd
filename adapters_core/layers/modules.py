"""The kinds of modules that an adapter can adapt: which one a module is, its sizes, and its dense weight.

The kinds are mlx-lm's (`mlx_lm.tuner.utils.linear_to_lora_layers`), dense and quantised with any bits and
mode. Knows no adapters and no paths; reads modules and changes none.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

__all__ = [
    "ModuleKind",
    "compute_dtype",
    "dense_weight",
    "factor_shapes",
    "is_quantized",
    "kind_of",
    "no_dora",
    "output_sizes",
    "product_shapes",
    "weight_shape",
]

_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


class ModuleKind(StrEnum):
    """What a module does with its weight.

    A product, one whose result is divided into several, a look-up, or a product with one of many experts'.
    """

    LINEAR = "linear"
    SPLIT = "split"
    EMBEDDING = "embedding"
    SWITCH = "switch"


_KINDS: dict[ModuleKind, tuple[type[nn.Module], ...]] = {
    ModuleKind.LINEAR: (nn.Linear, nn.QuantizedLinear),
    ModuleKind.EMBEDDING: (nn.Embedding, nn.QuantizedEmbedding),
    ModuleKind.SWITCH: (SwitchLinear, QuantizedSwitchLinear),
}


def kind_of(module: nn.Module) -> ModuleKind | None:
    """The kind of `module`; None if it cannot be adapted.

    A linear layer is a split one if it has `indices`, where its output is divided, and says so by its
    `output_dims`. Other modules that bring their own `to_lora` are of no kind, whatever they derive from:
    their adapters have tensors that are not known.
    """
    kind = next((kind for kind, types in _KINDS.items() if isinstance(module, types)), None)
    if kind is ModuleKind.LINEAR and _is_split(module):
        return ModuleKind.SPLIT
    return None if hasattr(module, "to_lora") else kind


def is_quantized(module: nn.Module) -> bool:
    """Whether `module`, of any of the kinds, holds its weight quantised."""
    return isinstance(module, _QUANTIZED)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape that the dense weight of `module` has, whatever its quantisation.

    (out, in) for linear layers, (num_embeddings, dims) for embeddings, (experts, out, in) for switch layers.
    """
    *rows, columns = module["weight"].shape
    if is_quantized(module):
        columns = module["scales"].shape[-1] * module.group_size
    return (*rows, columns)


def output_sizes(module: nn.Module) -> list[int]:
    """The sizes of the outputs of a split layer."""
    return [end - start for start, end in pairwise([0, *module["indices"], module["weight"].shape[0]])]


def no_dora(module: nn.Module) -> str | None:
    """Why there is no DoRA of `module`, of any of the kinds; None if there is."""
    match kind_of(module):
        case ModuleKind.SPLIT:
            return "mlx-lm's DoRA has one output, and this layer several"
        case ModuleKind.SWITCH:
            return "there is LoRA of experts and no DoRA"
        case _:
            return None


def factor_shapes(module: nn.Module, rank: int, is_dora: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter of `rank` for `module`, with mlx-lm's names and shapes.

    Raises:
        ValueError: no adapter of this form fits this module.
    """
    shapes = product_shapes(module, rank, is_dora)
    if kind_of(module) is not ModuleKind.SPLIT:
        return shapes
    sizes = enumerate(output_sizes(module))
    parts = {index: (shapes["lora_a"], (rank, size)) for index, size in sizes}
    return {f"lora_{name}.{index}": part[at] for index, part in parts.items() for at, name in enumerate("ab")}


def product_shapes(module: nn.Module, rank: int, is_dora: bool) -> dict[str, tuple[int, ...]]:
    """As `factor_shapes`, of a split layer the factors of one product for all of its outputs together."""
    kind = kind_of(module)
    if kind is None or (is_dora and no_dora(module)):
        raise ValueError(f"no {'DoRA' if is_dora else 'LoRA'} fits a {type(module).__name__}")
    *experts, rows, columns = weight_shape(module)
    if kind is ModuleKind.SWITCH:
        return {"lora_a": (*experts, rank, columns), "lora_b": (*experts, rows, rank)}
    ends = (rows, columns) if kind is ModuleKind.EMBEDDING else (columns, rows)
    shapes: dict[str, tuple[int, ...]] = {"lora_a": (ends[0], rank), "lora_b": (rank, ends[1])}
    if is_dora:
        shapes["m"] = (rows,)
    return shapes


def dense_weight(module: nn.Module) -> mx.array:
    """The weight of `module` in the shape of `weight_shape`, dequantised if need be.

    dtype: as stored; for quantised modules that of the scales, or bfloat16 where the mode has no float
    scales (mxfp4, mxfp8, nvfp4).
    """
    if not is_quantized(module):
        return module["weight"]
    global_scale = module.get("global_scale")
    if global_scale is None:
        return _dequantized(module, module["weight"], module["scales"], module.get("biases"), None)
    # MLX takes one global scale for a weight, and each expert has its own.
    parts = zip(module["weight"], module["scales"], global_scale, strict=True)
    return mx.stack([_dequantized(module, weight, scales, None, scale) for weight, scales, scale in parts])


def compute_dtype(module: nn.Module, default: mx.Dtype = mx.bfloat16) -> mx.Dtype:
    """The dtype that a dense version of `module` has: the scales', the weight's, the bias', or `default`."""
    for name in ("scales", "weight", "bias"):
        array = module.get(name)
        if array is not None and mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return default


def _is_split(module: Any) -> bool:
    indices = module.get("indices")
    if not isinstance(indices, list) or not indices or not all(isinstance(at, int) for at in indices):
        return False
    sizes = output_sizes(module)
    return min(sizes) > 0 and list(getattr(module, "output_dims", ())) == sizes


def _dequantized(
    module: Any, weight: mx.array, scales: mx.array, biases: mx.array | None, scale: mx.array | None
) -> mx.array:
    return mx.dequantize(
        weight,
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=scale,
    )

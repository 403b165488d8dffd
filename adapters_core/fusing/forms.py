"""The forms in which a merged weight can be stored, from the smallest to the largest. Measures nothing.

| form             | is                                                                       |
|------------------|--------------------------------------------------------------------------|
| requantized      | quantised as the base is                                                 |
| requantized_8bit | quantised with 8 bits (affine), in the base's groups                      |
| kept_dense       | dense, in the base's compute dtype, where the base is quantised           |
| dense            | the same, because the base is dense or "dequantize" was asked for         |
| unmerged         | the base's own weight, bit for bit, with the adapter's factors beside it  |

Between 4 and 8 bits lies nothing of use: a rounding with b bits errs by 1/(2ᵇ - 1) of the weights' range, so
that 6 bits take the error of 4 to a quarter, 8 bits to a seventeenth. docs/fusing.md has measurements.
Runs on the thread that owns the model, or on another that only reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..layers.adapted import AdaptedLayer, DoRALayer
from ..layers.builders import dense_like, quantized_like
from ..layers.modules import ModuleKind, compute_dtype, is_quantized, kind_of
from ..layers.surgery import copy_modes

__all__ = ["Form", "beside", "merged_forms", "size_bytes"]

Form = Literal["requantized", "requantized_8bit", "kept_dense", "dense", "unmerged"]

_FINER_BITS = 8
_AFFINE_GROUP_SIZES = (32, 64, 128)


def merged_forms(
    layer: AdaptedLayer, weight: mx.array, *, dequantize: bool, is_changed: bool
) -> Iterator[tuple[Form, nn.Module]]:
    """Plain modules with `weight` (the layer's fused one), made as they are asked for, the smallest first.

    With `dequantize`, or where the base is dense, there is the dense one alone. `is_changed` says whether
    `weight` differs from the base's: even an unchanged weight need not survive being quantised again.
    """
    base, bias = layer.reverted(), layer.fused_bias()
    if dequantize or not is_quantized(base):
        yield "dense", dense_like(base, weight, bias)
        return
    yield "requantized", quantized_like(base, weight, bias) if is_changed else _with_bias(base, bias)
    finer = _finer(base, weight, bias)
    if finer is not None:
        yield "requantized_8bit", finer
    yield "kept_dense", dense_like(base, weight, bias)


def beside(layer: AdaptedLayer) -> nn.Module:
    """`layer` anew, without dropout and frozen: the base module itself with the factors beside it."""
    base = layer.reverted()
    twin = type(layer)(base, layer.weights, 0.0)
    twin.freeze(recurse=False)
    if isinstance(twin, DoRALayer):
        twin.settle()
    twin.eval()
    return twin


def size_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module."""
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))
    return sum(array.nbytes for _, array in parameters)


def _with_bias(base: Any, bias: mx.array | None) -> nn.Module:
    if bias is None:
        return base
    twin = copy.copy(base)
    copy_modes(base, twin)
    twin.bias = bias.astype(compute_dtype(base))
    return twin


def _finer(base: Any, weight: mx.array, bias: mx.array | None) -> nn.Module | None:
    """A module like `base` with 8 bits; None where the base has as many, or its width has no such groups."""
    group_size = max(base.group_size, _AFFINE_GROUP_SIZES[0])
    columns = weight.shape[-1]
    if base.bits >= _FINER_BITS or group_size not in _AFFINE_GROUP_SIZES or columns % group_size:
        return None
    pattern = copy.copy(base)
    copy_modes(base, pattern)
    pattern.group_size, pattern.bits, pattern.mode = group_size, _FINER_BITS, "affine"
    pattern.pop("global_scale", None)
    finer = cast(Any, quantized_like(pattern, weight, bias))
    if kind_of(base) is ModuleKind.EMBEDDING:
        finer.num_embeddings, finer.dims = weight.shape
    return finer

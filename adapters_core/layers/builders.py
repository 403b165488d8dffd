"""New plain modules with a given weight, made in the image of a base module of any kind.

What the base has beside its weight (bias, quantisation, sizes) is taken over, its modes too. Changes no
module. Runs on the thread that owns the model.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .modules import ModuleKind, compute_dtype, is_quantized, kind_of, output_sizes, weight_shape
from .surgery import copy_modes

__all__ = ["dense_like", "quantized_like"]


class _SplitLinear(nn.Linear):
    """A dense split layer, which stands for a quantised one: `indices` say where its output is divided."""

    @property
    def output_dims(self) -> list[int]:
        """The sizes of its outputs."""
        return output_sizes(self)

    def __call__(self, x: mx.array) -> Any:
        return mx.split(super().__call__(x), self["indices"], axis=-1)


_DENSE: dict[ModuleKind, type[nn.Module]] = {
    ModuleKind.LINEAR: nn.Linear,
    ModuleKind.SPLIT: _SplitLinear,
    ModuleKind.EMBEDDING: nn.Embedding,
    ModuleKind.SWITCH: SwitchLinear,
}


def dense_like(base: nn.Module, weight: mx.array, bias: mx.array | None = None) -> nn.Module:
    """A dense module of the base's kind with `weight`, in the base's compute dtype and with its modes.

    `bias` stands in for the base's own, if given.
    """
    is_own = _kind(base) is ModuleKind.SPLIT and not is_quantized(base)
    dense = _empty(type(base) if is_own else _DENSE[_kind(base)], base, bias)
    dense.weight = weight.astype(compute_dtype(base))
    return dense


def quantized_like(base: Any, weight: mx.array, bias: mx.array | None = None) -> nn.Module:
    """A module of the base's kind with `weight`, quantised as the base is, and with its modes.

    `bias` stands in for the base's own, if given.
    """
    kind = _kind(base)
    quantized = _empty(type(base), base, bias)
    quantized.group_size, quantized.bits, quantized.mode = base.group_size, base.bits, base.mode
    weight = weight.astype(compute_dtype(base))
    if kind is ModuleKind.SWITCH:
        has_global_scale = base.get("global_scale") is not None
        cast(QuantizedSwitchLinear, quantized)._quantize(weight, has_global_scale)
    else:
        packed = mx.quantize(weight, base.group_size, base.bits, mode=base.mode)
        quantized.weight, quantized.scales, *biases = packed
        quantized.biases = biases[0] if biases else None
    if kind is ModuleKind.EMBEDDING:
        quantized.num_embeddings, quantized.dims = weight_shape(base)
    quantized.freeze()
    return quantized


def _kind(base: nn.Module) -> ModuleKind:
    kind = kind_of(base)
    if kind is None:
        raise ValueError(f"a {type(base).__name__} is no kind of module that an adapter can adapt")
    return kind


def _empty(made: type[nn.Module], base: nn.Module, bias: mx.array | None) -> nn.Module:
    # The constructors draw initial weights, which would move the caller's random state.
    module = made.__new__(made)
    nn.Module.__init__(module)
    if bias is None:
        bias = base.get("bias")
    elif (old := base.get("bias")) is not None:
        bias = bias.astype(old.dtype)
    else:
        bias = bias.astype(compute_dtype(base))
    if bias is not None:
        module.bias = bias
    if kind_of(base) is ModuleKind.SPLIT:
        module["indices"] = base["indices"]
    copy_modes(base, module)
    return module

"""Linear layers with one adapter each: the seed of training, and what `load` puts into a model.

    LoRA (arXiv:2106.09685)   y = W x + b + s·B A x
    DoRA (arXiv:2402.09353)   y = m / ‖W + s·B A‖ ⊙ (W x + s·B A x) + b

with `lora_a` (in, r) = Aᵀ, `lora_b` (r, out) = Bᵀ, `m` (out,), the norm taken row by row and treated as
a constant by the gradient. Parameter paths equal mlx-lm's. Knows no files and no model. Runs on the
thread that owns the model.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from .config import AdapterConfig, FineTuneType
from .module_weights import ModuleWeights
from .surgery import copy_modes
from .targets import linear_shape

__all__ = [
    "DoRALinear",
    "LoRALayer",
    "LoRALinear",
    "QDoRALinear",
    "QLoRALinear",
    "adapted",
    "compute_dtype",
    "dense_linear",
    "dense_weight",
    "quantized_like",
    "with_weights",
]

_M = TypeVar("_M", bound=nn.Module)


@runtime_checkable
class LoRALayer(Protocol):
    """A layer that carries an adapter."""

    def fused(self) -> nn.Module:
        """A new plain layer with the adapter merged in; a quantised one stays quantised as it was."""
        ...

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was adapted."""
        ...


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight (out, in) of an `nn.Linear` or `nn.QuantizedLinear`, dequantised if need be.

    dtype: as stored; for quantised layers that of the scales, or bfloat16 where the mode has no float
    scales (mxfp4, mxfp8, nvfp4).
    """
    if not isinstance(linear, nn.QuantizedLinear):
        return linear["weight"]
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def compute_dtype(linear: nn.Module, default: mx.Dtype = mx.bfloat16) -> mx.Dtype:
    """The dtype that a dense version of `linear` has: the scales', the weight's, the bias', or `default`."""
    for name in ("scales", "weight", "bias"):
        array = linear.get(name)
        if array is not None and mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return default


class _AdaptedLinear(nn.Module):
    """What LoRA and DoRA share: the frozen base layer, the factors, and leaving again."""

    def __init__(self, linear: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = weights.scale
        self.dropout = nn.Dropout(p=dropout)
        self.lora_a = weights.lora_a
        self.lora_b = weights.lora_b

    @property
    def weights(self) -> ModuleWeights:
        """The factors as they are now."""
        return ModuleWeights(self.lora_a, self.lora_b, self.get("m"), self.scale)

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was adapted."""
        return self.linear

    def fused_weight(self) -> mx.array:
        """The weight (out, in), float32, that computes what this layer computes without dropout."""
        raise NotImplementedError

    def fused(self) -> nn.Module:
        """A new plain layer with the adapter merged in, of the base's kind and dtype."""
        weight = self.fused_weight()
        if isinstance(self.linear, nn.QuantizedLinear):
            return quantized_like(self.linear, weight)
        return dense_linear(self.linear, weight)

    def _update(self, x: mx.array) -> mx.array:
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return (self.scale * z).astype(x.dtype)

    def _adapted_weight(self) -> mx.array:
        """W + s·B A, float32, (out, in)."""
        delta = self.lora_b.T.astype(mx.float32) @ self.lora_a.T.astype(mx.float32)
        return dense_weight(self.linear).astype(mx.float32) + self.scale * delta


class LoRALinear(_AdaptedLinear):
    """An `nn.Linear` with a LoRA. Forward: x (…, in) → (…, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._update(x)

    def fused_weight(self) -> mx.array:
        """W + s·B A, float32, (out, in)."""
        return self._adapted_weight()


class QLoRALinear(LoRALinear):
    """An `nn.QuantizedLinear` with a LoRA, whose factors are not quantised."""


class DoRALinear(_AdaptedLinear):
    """An `nn.Linear` with a DoRA. Forward: x (…, in) → (…, out)."""

    def __init__(self, linear: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        super().__init__(linear, weights, dropout)
        norm = mx.linalg.norm(dense_weight(linear).astype(mx.float32), axis=1)
        self.m = norm if weights.magnitude is None else weights.magnitude
        self._settled: tuple[mx.array, ...] = ()

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.linear.get("bias")
        y = self.linear(x)
        if bias is not None:
            y = y - bias
        y = self._factor().astype(x.dtype) * (y + self._update(x))
        return y if bias is None else y + bias

    def fused_weight(self) -> mx.array:
        """m / ‖W + s·B A‖ ⊙ (W + s·B A), float32, (out, in)."""
        adapted_weight = self._adapted_weight()
        norm = mx.linalg.norm(adapted_weight, axis=1)
        return (self.m.astype(mx.float32) / norm)[:, None] * adapted_weight

    def settle(self) -> None:
        """Compute m / ‖W + s·B A‖ now, for forwards outside of training with these very parameters."""
        inputs = (self.m, self.lora_a, self.lora_b)
        factor = self._computed_factor()
        mx.eval(factor)
        self._settled = (*inputs, factor)

    def _factor(self) -> mx.array:
        # Arrays are compared by identity: an update, or a gradient's tracer, puts other ones in place.
        current = (self.m, self.lora_a, self.lora_b)
        if self._settled and not self.training and all(map(_same, current, self._settled)):
            return self._settled[-1]
        return self._computed_factor()

    def _computed_factor(self) -> mx.array:
        norm = mx.stop_gradient(mx.linalg.norm(self._adapted_weight(), axis=1))
        return self.m / norm


class QDoRALinear(DoRALinear):
    """An `nn.QuantizedLinear` with a DoRA, whose factors are not quantised."""


def adapted(linear: nn.Module, config: AdapterConfig) -> LoRALinear | DoRALinear:
    """`linear` with a new adapter that changes nothing yet.

    As mlx-lm begins: A uniform in ±1/√in from MLX's global random state, B zero, m the norms of W's rows.
    """
    rows, columns = linear_shape(linear)
    parameters = config.lora_parameters
    bound = 1 / math.sqrt(columns)
    lora_a = mx.random.uniform(low=-bound, high=bound, shape=(columns, parameters.rank))
    lora_b = mx.zeros((parameters.rank, rows))
    weights = ModuleWeights(lora_a, lora_b, None, parameters.scale)
    return with_weights(linear, weights, config)


def with_weights(linear: nn.Module, weights: ModuleWeights, config: AdapterConfig) -> LoRALinear | DoRALinear:
    """`linear` with an adapter of the class that the config and the base call for, holding `weights`."""
    quantized = isinstance(linear, nn.QuantizedLinear)
    kind: type[LoRALinear] | type[DoRALinear]
    if config.fine_tune_type is FineTuneType.DORA:
        kind = QDoRALinear if quantized else DoRALinear
    else:
        kind = QLoRALinear if quantized else LoRALinear
    return kind(linear, weights, config.lora_parameters.dropout)


def dense_linear(base: nn.Module, weight: mx.array) -> nn.Linear:
    """An `nn.Linear` with `weight` (out, in) in the base's compute dtype, and the base's bias and mode."""
    linear = _empty(nn.Linear, base)
    linear.weight = weight.astype(compute_dtype(base))
    return linear


def quantized_like(base: nn.QuantizedLinear, weight: mx.array) -> nn.QuantizedLinear:
    """An `nn.QuantizedLinear` with `weight` (out, in), quantised as `base` is, and its bias and mode."""
    linear = _empty(nn.QuantizedLinear, base)
    linear.group_size, linear.bits, linear.mode = base.group_size, base.bits, base.mode
    packed = mx.quantize(weight.astype(compute_dtype(base)), base.group_size, base.bits, mode=base.mode)
    linear.weight, linear.scales, *biases = packed
    linear.biases = biases[0] if biases else None
    linear.freeze()
    return linear


def _empty(kind: type[_M], base: nn.Module) -> _M:
    # The constructors draw initial weights, which would move the caller's random state.
    linear = kind.__new__(kind)
    nn.Module.__init__(linear)
    if (bias := base.get("bias")) is not None:
        linear.bias = bias
    copy_modes(base, linear)
    return linear


def _same(left: object, right: object) -> bool:
    return left is right

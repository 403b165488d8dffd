"""Linear layers with one adapter: y = W x + b + s·(B A x + c), and the same scaled row by row for DoRA.

`lora_a` (in, r) = Aᵀ, `lora_b` (r, out) = Bᵀ; c (out,) is a bias of the adapter's own, where it has one. Runs
on the thread that owns the model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .adapted import AdaptedLayer, DoRALayer

__all__ = ["DoRALinear", "LoRALinear", "QDoRALinear", "QLoRALinear"]


class _AdaptedLinear(AdaptedLayer):
    linear: Any

    def _update(self, x: mx.array) -> mx.array:
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        if "lora_bias" in self:
            z = z + self.lora_bias
        return (self.scale * z).astype(x.dtype)

    def _delta(self) -> mx.array:
        return self.lora_b.T.astype(mx.float32) @ self.lora_a.T.astype(mx.float32)


class LoRALinear(_AdaptedLinear):
    """An `nn.Linear` with a LoRA. Forward: x (…, in) → (…, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._update(x)


class QLoRALinear(LoRALinear):
    """An `nn.QuantizedLinear` with a LoRA, whose factors are not quantised."""


class DoRALinear(_AdaptedLinear, DoRALayer):
    """An `nn.Linear` with a DoRA. Forward: x (…, in) → (…, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.linear.get("bias")
        y = self.linear(x)
        if bias is not None:
            y = y - bias
        y = self._factor().astype(x.dtype) * (y + self._update(x))
        return y if bias is None else y + bias


class QDoRALinear(DoRALinear):
    """An `nn.QuantizedLinear` with a DoRA, whose factors are not quantised."""

"""Linear layers whose output is divided into several, with a LoRA for each: yᵢ = Wᵢ x + s·Bᵢ Aᵢ x.

mlx-lm has them where query, key and value are one weight (`FusedLinear` in mlx_lm/models/afm7.py, whose
adapters are its `FusedLoRALinear`). `lora_a` [(in, r), …] = Aᵢᵀ, `lora_b` [(r, outᵢ), …] = Bᵢᵀ. Runs on the
thread that owns the model.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapted import AdaptedLayer
from .module_weights import ModuleWeights
from .modules import is_quantized, output_sizes

__all__ = ["LoRASplitLinear", "undivided"]


class LoRASplitLinear(AdaptedLayer):
    """A dense or quantised split layer with a LoRA. Forward: x (…, in) → a tuple of (…, outᵢ)."""

    linear: Any

    def __init__(self, base: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        super().__init__(base, weights, dropout)
        parts = weights.divided(output_sizes(base))
        self.lora_a = [a for a, _ in parts]
        self.lora_b = [b for _, b in parts]

    @property
    def weights(self) -> ModuleWeights:
        """The factors as they are now."""
        parts = zip(self.lora_a, self.lora_b, strict=True)
        return ModuleWeights.of_parts(parts, self.scale, self.get("lora_bias"))

    def __call__(self, x: mx.array) -> tuple[mx.array, ...]:
        dropped = self.dropout(x)
        updates = [(dropped @ a) @ b for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        if "lora_bias" in self:
            biases = mx.split(self.lora_bias, self.linear["indices"])
            updates = [z + bias for z, bias in zip(updates, biases, strict=True)]
        outputs = zip(self.linear(x), updates, strict=True)
        return tuple(y + (self.scale * z).astype(x.dtype) for y, z in outputs)

    def _delta(self) -> mx.array:
        factors = zip(self.lora_a, self.lora_b, strict=True)
        return mx.concatenate([b.T.astype(mx.float32) @ a.T.astype(mx.float32) for a, b in factors])


def undivided(module: nn.Module) -> nn.Module:
    """The plain linear layer that a split one is before its output is divided; it shares the arrays."""
    plain: Any = copy.copy(module)
    plain.__class__ = nn.QuantizedLinear if is_quantized(module) else nn.Linear
    return plain

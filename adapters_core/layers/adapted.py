"""What layers with one adapter share, whatever their kind: base, factors, DoRA's factor, leaving again.

    LoRA (arXiv:2106.09685)   W' = W + s·Δ
    DoRA (arXiv:2402.09353)   W' = m / ‖W + s·Δ‖ ⊙ (W + s·Δ)

with Δ the product of the factors in the shape of W, the norm taken row by row and treated as a constant by
the gradient. Knows no files and no model. Runs on the thread that owns the model.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .builders import dense_like, quantized_like
from .magnitudes import dora_factor
from .module_weights import ModuleWeights
from .modules import dense_weight, is_quantized

__all__ = ["AdaptedLayer", "DoRALayer"]


class AdaptedLayer(nn.Module):
    """A frozen base module with factors beside it.

    Parameter paths equal mlx-lm's: the base hangs at `BASE`, the factors at `lora_a` and `lora_b`.
    """

    BASE = "linear"

    def __init__(self, base: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        super().__init__()
        self[self.BASE] = base
        self.scale = weights.scale
        self.dropout = nn.Dropout(p=dropout)
        self.lora_a = weights.lora_a
        self.lora_b = weights.lora_b
        if weights.bias is not None:
            self.lora_bias = weights.bias
        self.lookup_only = weights.lookup_only
        self.head_only = weights.head_only

    @property
    def weights(self) -> ModuleWeights:
        """The factors as they are now."""
        bias = self.get("lora_bias")
        return ModuleWeights(
            self.lora_a,
            self.lora_b,
            self.get("m"),
            self.scale,
            bias,
            lookup_only=self.lookup_only,
            head_only=self.head_only,
        )

    def reverted(self) -> nn.Module:
        """The base module, the very one that was adapted."""
        return self[self.BASE]

    def fused_weight(self) -> mx.array:
        """The weight, float32 and in the shape of the dense one, that computes what this layer computes."""
        return self._adapted_weight()

    def fused_bias(self) -> mx.array | None:
        """The bias (out,), float32, that goes with `fused_weight`; None for the base's own."""
        added, own = self.get("lora_bias"), self.reverted().get("bias")
        if added is None:
            return None
        added = self.scale * added.astype(mx.float32)
        return added if own is None else own.astype(mx.float32) + added

    def fused(self) -> nn.Module:
        """A new plain module with the adapter merged in, of the base's kind, quantisation and dtype."""
        build = quantized_like if is_quantized(self.reverted()) else dense_like
        return build(self.reverted(), self.fused_weight(), self.fused_bias())

    def _delta(self) -> mx.array:
        """The product of the factors, float32, in the shape of the dense weight."""
        raise NotImplementedError

    def _adapted_weight(self) -> mx.array:
        """W + s·Δ, float32."""
        return dense_weight(self.reverted()).astype(mx.float32) + self.scale * self._delta()


class DoRALayer(AdaptedLayer):
    """A layer with magnitudes `m`, one for each row of its weight."""

    def __init__(self, base: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        """As mlx-lm begins, `m` are the norms of W's rows where `weights` have no magnitudes.

        Raises:
            ValueError: `weights` have a bias: what it means beside magnitudes is defined nowhere.
        """
        if weights.bias is not None:
            raise ValueError("a DoRA has no bias of its own")
        super().__init__(base, weights, dropout)
        norm = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=-1)
        self.m = norm if weights.magnitude is None else weights.magnitude
        self._settled: tuple[mx.array, ...] = ()

    def fused_weight(self) -> mx.array:
        """m / ‖W + s·Δ‖ ⊙ (W + s·Δ), float32."""
        adapted_weight = self._adapted_weight()
        norm = mx.linalg.norm(adapted_weight, axis=-1)
        return dora_factor(self.m.astype(mx.float32), norm)[:, None] * adapted_weight

    def settle(self) -> None:
        """Compute m / ‖W + s·Δ‖ now, for forwards outside of training with these very parameters."""
        inputs = (self.m, self.lora_a, self.lora_b)
        factor = self._computed_factor()
        mx.eval(factor)
        self._settled = (*inputs, factor)

    def _settled_factor(self) -> mx.array | None:
        """What `settle` computed, if it is still right."""
        # Arrays are compared by identity: an update, or a gradient's tracer, puts other ones in place.
        current = (self.m, self.lora_a, self.lora_b)
        if self._settled and not self.training and all(map(_same, current, self._settled)):
            return self._settled[-1]
        return None

    def _factor(self) -> mx.array:
        factor = self._settled_factor()
        return self._computed_factor() if factor is None else factor

    def _computed_factor(self) -> mx.array:
        norm = mx.stop_gradient(mx.linalg.norm(self._adapted_weight(), axis=-1))
        return dora_factor(self.m, norm)


def _same(left: object, right: object) -> bool:
    return left is right

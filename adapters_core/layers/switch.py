"""Switch layers, one product of many experts' for each token, with one LoRA: y = (W_e + s·B_e A_e) x + b_e.

`lora_a` (experts, r, in), `lora_b` (experts, out, r). Bases may be quantised. There is no DoRA of them, in
mlx-lm or elsewhere. Runs on the thread that owns the model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .adapted import AdaptedLayer

__all__ = ["LoRASwitchLinear", "gather_mm"]


class LoRASwitchLinear(AdaptedLayer):
    """A `SwitchLinear` or `QuantizedSwitchLinear` with a LoRA.

    Forward: x (…, 1, 1, in) or (…, k, 1, in) and indices (…, k) → (…, k, 1, out); or with tokens sorted by
    expert, x (n, 1, in) and indices (n,) → (n, 1, out).
    """

    linear: Any

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = gather_mm(self.dropout(x), self.lora_a.swapaxes(-1, -2), indices, sorted_indices)
        z = gather_mm(z, self.lora_b.swapaxes(-1, -2), indices, sorted_indices)
        return y + (self.scale * z).astype(x.dtype)

    def _delta(self) -> mx.array:
        return self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32)


def gather_mm(x: mx.array, matrices: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """x (…, 1, n) times the matrices (…, n, m) that `indices` name by number → (…, 1, m).

    On a CPU, where MLX has this product for float32 alone, that is the type of the result.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        x, matrices = x.astype(mx.float32), matrices.astype(mx.float32)
    return mx.gather_mm(x, matrices, rhs_indices=indices, sorted_indices=sorted_indices)

"""Factors side by side: the weighted sum of what several adapters bring to one module, exactly.

    Σ wᵢ·sᵢ·Bᵢ Aᵢ = B A,   A = [A₁; A₂; …],   B = [w₁·s₁·B₁, w₂·s₂·B₂, …]

so that a sum is a LoRA whose rank is the sum of the ranks, with scale 1, and no entry is rounded but once, to
float32. Knows no adapters and no model. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..layers.module_weights import ModuleWeights

__all__ = ["side_by_side"]


def side_by_side(terms: Sequence[tuple[ModuleWeights, float]]) -> ModuleWeights:
    """The sum of (module, weight) terms, evaluated and float32.

    The modules have the same outer shapes, no magnitudes, and the same `lookup_only`.
    """
    # Experts have (experts, r, in) and (experts, out, r), all others (in, r) and (r, out).
    a_axis, b_axis = (1, 2) if terms[0][0].lora_a.ndim == 3 else (1, 0)
    lora_a = mx.concatenate([module.lora_a.astype(mx.float32) for module, _ in terms], axis=a_axis)
    lora_b = mx.concatenate([_scaled(module.lora_b, module, weight) for module, weight in terms], axis=b_axis)
    biases = [_scaled(module.bias, module, weight) for module, weight in terms if module.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    mx.eval([lora_a, lora_b, *([] if bias is None else [bias])])
    return ModuleWeights(lora_a, lora_b, None, 1.0, bias, terms[0][0].lookup_only)


def _scaled(array: mx.array, module: ModuleWeights, weight: float) -> mx.array:
    return array.astype(mx.float32) * (weight * module.scale)

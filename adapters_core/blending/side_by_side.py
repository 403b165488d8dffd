"""Factors side by side: the weighted sum of what several adapters bring to one module, exactly.

    Σ wᵢ·sᵢ·Bᵢ Aᵢ = B A,   A = [A₁; A₂; …],   B = [w₁·s₁·B₁, w₂·s₂·B₂, …]

so that a sum is a LoRA whose rank is the sum of the ranks, with scale 1, and no entry is rounded but once, to
float32. Where each output of a split layer has a LoRA of its own, so has it in the sum. Knows no adapters and
no model. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..layers.module_weights import ModuleWeights

__all__ = ["side_by_side"]


def side_by_side(terms: Sequence[tuple[ModuleWeights, float]]) -> ModuleWeights:
    """The sum of (module, weight) terms, evaluated and float32.

    The modules have the same outer shapes, no magnitudes, and the same `lookup_only` and `head_only`.
    """
    factors = [weight * module.scale for module, weight in terms]
    biases = [
        module.bias.astype(mx.float32) * factor
        for (module, _), factor in zip(terms, factors, strict=True)
        if module.bias is not None
    ]
    bias = sum(biases[1:], biases[0]) if biases else None
    modules = [module for module, _ in terms]
    if all(module.parts for module in modules):
        by_output = zip(*(module.parts for module in modules), strict=True)
        whole = ModuleWeights.of_parts([_joined(pairs, factors) for pairs in by_output], 1.0, bias)
    else:
        a, b = _joined([(module.lora_a, module.lora_b) for module in modules], factors)
        first = modules[0]
        whole = ModuleWeights(a, b, None, 1.0, bias, lookup_only=first.lookup_only, head_only=first.head_only)
    mx.eval(whole.lora_a, whole.lora_b, [array for array in whole.arrays if array is not None])
    return whole


def _joined(
    pairs: Sequence[tuple[mx.array, mx.array]], factors: Sequence[float]
) -> tuple[mx.array, mx.array]:
    """A and B of the sum of `factors` times B A, not evaluated."""
    # Experts have (experts, r, in) and (experts, out, r), all others (in, r) and (r, out).
    a_axis, b_axis = (1, 2) if pairs[0][0].ndim == 3 else (1, 0)
    scaled = [b.astype(mx.float32) * factor for (_, b), factor in zip(pairs, factors, strict=True)]
    lora_a = mx.concatenate([a.astype(mx.float32) for a, _ in pairs], axis=a_axis)
    return lora_a, mx.concatenate(scaled, axis=b_axis)

"""Several LoRA adapters as one: the weighted sum of their changes, exactly. Runs on any thread.

    Σ wᵢ·sᵢ·Bᵢ Aᵢ = B A,   A = [A₁; A₂; …],   B = [w₁·s₁·B₁, w₂·s₂·B₂, …]

so that a sum is a LoRA whose rank is the sum of the ranks, with scale 1 and no rounding but the weights' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..config import AdapterConfig
from ..container import AdapterContainer
from ..errors import BlendError
from ..layers.adapted import AdaptedLayer
from ..layers.kinds import with_weights
from ..layers.module_weights import ModuleWeights
from ..layers.targets import module_at

__all__ = ["summed", "summed_layers"]


def summed_layers(
    model: nn.Module, terms: Sequence[tuple[AdapterContainer, float]]
) -> dict[str, AdaptedLayer]:
    """Layers for `model`, by path, with the sum of (adapter, weight) terms; changes nothing.

    Raises:
        InvalidAdapterError, UnsupportedModelError, ContainerStateError: as `AdapterContainer.check`.
        BlendError: as `summed`.
    """
    weights = summed([(container.check(model), weight) for container, weight in terms])
    config = AdapterConfig(fine_tune_type=terms[0][0].type)
    return {path: with_weights(module_at(model, path), one, config) for path, one in weights.items()}


def summed(terms: Sequence[tuple[Mapping[str, ModuleWeights], float]]) -> dict[str, ModuleWeights]:
    """One adapter's weights by module, for (an adapter's, weight) terms; a module may be in any of them.

    A single adapter at weight 1 is returned as it is. B and bias are float32, so that no weight is rounded.

    Raises:
        BlendError: a DoRA is weighted or summed: it rescales the base, so its change is no sum.
    """
    if len(terms) == 1 and terms[0][1] == 1.0:
        return dict(terms[0][0])
    parts: dict[str, list[tuple[ModuleWeights, float]]] = {}
    for weights, weight in terms:
        for path, one in weights.items():
            if one.magnitude is not None:
                raise BlendError("a DoRA adapter can only be fused alone and at weight 1: it is not linear")
            if one.lookup_only:
                raise BlendError(f"{path} is adapted for look-ups alone, which can only be fused by itself")
            parts.setdefault(path, []).append((one, weight * one.scale))
    return {path: _concatenated(found) for path, found in parts.items()}


def _concatenated(parts: list[tuple[ModuleWeights, float]]) -> ModuleWeights:
    # Experts have (experts, r, in) and (experts, out, r), all others (in, r) and (r, out).
    a_axis, b_axis = (1, 2) if parts[0][0].lora_a.ndim == 3 else (1, 0)
    lora_a = mx.concatenate([one.lora_a for one, _ in parts], axis=a_axis)
    lora_b = mx.concatenate([one.lora_b.astype(mx.float32) * factor for one, factor in parts], axis=b_axis)
    biases = [one.bias.astype(mx.float32) * factor for one, factor in parts if one.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    mx.eval([lora_a, lora_b, *([] if bias is None else [bias])])
    return ModuleWeights(lora_a, lora_b, None, 1.0, bias)

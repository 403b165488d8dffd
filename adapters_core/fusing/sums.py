"""Several LoRA adapters as one to be fused: the exact sum of their weighted changes. Runs on any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.nn as nn

from ..blending.side_by_side import side_by_side
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

    A single adapter at weight 1 is returned as it is; of all others, the factors are float32.

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
            if one.lookup_only or one.head_only:
                part = "look-ups" if one.lookup_only else "its tied head"
                raise BlendError(
                    f"{path} is adapted for {part} alone, which can only be fused alone and at weight 1"
                )
            parts.setdefault(path, []).append((one, weight))
    return {path: side_by_side(found) for path, found in parts.items()}

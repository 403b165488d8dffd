"""A head that is tied to the embedding and adapted alone, as PEFT has it where it is a target.

    logits = W h + s·B A h,   while look-ups stay the base's rows of W

To PEFT it is a linear layer. The MLX model has no such module: it is the embedding, with factors for its use
as a head (`ModuleWeights.head_only`). Changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ...layers.module_weights import ModuleWeights
from ...layers.modules import weight_shape
from ...layers.targets import module_at
from .config import PeftConfig
from .factors import Factors
from .module_factors import left_out, module_weights
from .names import HEADS
from .paths import transformers_name
from .places import Places

__all__ = ["as_head", "heads_apart"]

_INNER = "language_model."


def as_head(
    model: nn.Module, embedding: str, config: PeftConfig, factors: Factors
) -> tuple[ModuleWeights | None, list[str]]:
    """What the head's `factors` are to the embedding at this path, and why they cannot be that."""
    if problems := left_out(config, factors, is_linear=True):
        return None, problems
    shape = weight_shape(module_at(model, embedding))
    name = transformers_name(str(getattr(model, "model_type", "")), embedding)
    places = Places(model, {name: shape[0]}).of(name)
    if len(places) != 1 or places[0].module != embedding or not places[0].is_plain:
        return None, factors.refused(
            "the head is tied to an embedding that mlx-lm changes on loading, and how that changes the head "
            "alone is not known; merge the adapter into its base"
        )
    weights, problems = module_weights(config, factors, is_embedding=False, shape=shape)
    if weights is None:
        return None, problems
    if weights.bias is not None:
        return None, factors.refused("a bias (lora_bias) of a head that is tied to the embedding")
    return _turned(weights, head_only=True), []


def heads_apart(
    weights: Mapping[str, ModuleWeights], embeddings: Collection[str]
) -> tuple[dict[str, ModuleWeights], list[str]]:
    """`weights` by name with tied heads that are adapted alone as linear layers, and the other embeddings."""
    heads = {
        path: f"{_INNER if path.startswith(_INNER) else ''}{HEADS[0]}"
        for path, one in weights.items()
        if one.head_only
    }
    named = {
        heads.get(path, path): _turned(one, head_only=False) if path in heads else one
        for path, one in weights.items()
    }
    return named, [path for path in embeddings if path not in heads]


def _turned(weights: ModuleWeights, *, head_only: bool) -> ModuleWeights:
    """A linear layer's factors as those of the embedding that it is, or the other way round."""
    a, b = mx.contiguous(weights.lora_b.T), mx.contiguous(weights.lora_a.T)
    return replace(weights, lora_a=a, lora_b=b, head_only=head_only)

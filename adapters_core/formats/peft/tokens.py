"""Trained tokens of a PEFT adapter: new rows for a few tokens of an embedding, as a LoRA of that embedding.

    W' = W with row tᵢ replaced by vᵢ = W + A B,   A (num_embeddings, k) with A[tᵢ, i] = 1,   Bᵢ = vᵢ - W[tᵢ]

PEFT's `trainable_tokens_delta` (k, dims) holds the vᵢ themselves. The sum has vᵢ to the rounding of one
addition. A head that is tied to the embedding is changed with it, as in PEFT. Changes nothing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, weight_shape
from .config import PeftConfig
from .factors import Factors
from .names import Leaf, is_input_embedding

__all__ = ["token_indices", "token_weights"]

_MAX_TOKENS = 256


def token_indices(config: PeftConfig, name: str) -> list[int]:
    """The tokens of the module `name` that were trained, in order; empty for none."""
    wanted = config.fields.trainable_token_indices
    if isinstance(wanted, dict):
        found = [indices for key, indices in wanted.items() if name == key or name.endswith(f".{key}")]
        return found[0] if found else []
    return list(wanted) if wanted and is_input_embedding(name) else []


def token_weights(
    factors: Factors, indices: list[int], embedding: Any
) -> tuple[ModuleWeights | None, list[str]]:
    """What the rows in `factors` are to the base's `embedding`, and why they cannot be that."""
    if kind_of(embedding) is not ModuleKind.EMBEDDING:
        return None, factors.refused(
            f"trained tokens (trainable_token_indices) of {factors.path}, which is a layer of its own and no "
            "embedding"
        )
    count, dims = weight_shape(embedding)
    if len(indices) > _MAX_TOKENS:
        return None, factors.refused(f"{len(indices)} trained tokens; up to {_MAX_TOKENS} can be served")
    if len(set(indices)) < len(indices) or max(indices) >= count:
        return None, factors.refused(f"expected different tokens below {count} in trainable_token_indices")
    if problems := factors.problems({Leaf.TOKENS: (len(indices), dims)}, len(indices)):
        return None, problems
    tokens = mx.array(indices)
    new = factors.tensors[Leaf.TOKENS]
    lora_b = new.astype(mx.float32) - embedding(tokens).astype(mx.float32)
    lora_a = (mx.arange(count)[:, None] == tokens[None]).astype(new.dtype)
    return ModuleWeights(lora_a, lora_b.astype(new.dtype), None, 1.0), []

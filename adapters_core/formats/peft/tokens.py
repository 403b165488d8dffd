"""Trained rows of a PEFT adapter: new rows for a few tokens of an embedding or a head, as a LoRA of it.

    W' = W with row tᵢ replaced by vᵢ = W + A B,   A (rows, k) with A[tᵢ, i] = 1,   Bᵢ = vᵢ - W[tᵢ]

PEFT's `trainable_tokens_delta` (k, dims) holds the vᵢ themselves. A and B are float32 whatever the base's
dtype is, so that the sum has vᵢ to two of its roundings, of Bᵢ and of the addition. A head that is tied to
the embedding is changed with it, as in PEFT. In a DoRA, the magnitudes are the norms of W + A B, so that
nothing is scaled. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, dense_weight, kind_of, weight_shape
from .config import PeftConfig
from .factors import Factors
from .names import Leaf, is_input_embedding

__all__ = ["MAX_ROWS", "has_rows", "row_weights", "token_indices", "token_weights"]

MAX_ROWS = 256


def token_indices(config: PeftConfig, name: str) -> list[int]:
    """The tokens of the module `name` that were trained, in order; empty for none."""
    wanted = config.fields.trainable_token_indices
    if isinstance(wanted, dict):
        return next((indices for key, indices in wanted.items() if name.endswith(key)), [])
    return list(wanted) if wanted and is_input_embedding(name) else []


def has_rows(module: nn.Module) -> bool:
    """Whether rows of the weight of `module` can be replaced: those of linear layers and embeddings."""
    return kind_of(module) in (ModuleKind.LINEAR, ModuleKind.EMBEDDING)


def token_weights(
    config: PeftConfig, factors: Factors, indices: list[int], module: nn.Module
) -> tuple[ModuleWeights | None, list[str]]:
    """What the rows in `factors` are to the base's `module`, and why they cannot be that."""
    if not has_rows(module):
        return None, factors.refused(
            f"trained tokens (trainable_token_indices) of {factors.path}, a {type(module).__name__}; only "
            "embeddings and heads have rows of tokens"
        )
    if module.get("bias") is not None:
        return None, factors.refused(
            f"trained tokens (trainable_token_indices) of {factors.path}, which has a bias, and PEFT leaves "
            "the bias out where tokens were trained"
        )
    count, dims = weight_shape(module)
    if len(indices) > MAX_ROWS:
        return None, factors.refused(
            f"{len(indices)} trained tokens; up to {MAX_ROWS} can be served. Merge the adapter into its base "
            "and serve that"
        )
    if len(set(indices)) < len(indices) or max(indices) >= count:
        return None, factors.refused(
            f"expected different tokens below {count} in trainable_token_indices, got {_shown(indices)}; a "
            "resized vocabulary needs a base of its size"
        )
    if problems := factors.problems({Leaf.TOKENS: (len(indices), dims)}, len(indices)):
        return None, problems
    new = factors.tensors[Leaf.TOKENS]
    return row_weights(module, indices, new, is_dora=config.fields.use_dora), []


def row_weights(module: nn.Module, rows: Sequence[int], new: mx.array, *, is_dora: bool) -> ModuleWeights:
    """What gives the base's `module`, one that `has_rows`, the rows `new` (k, dims) at `rows`; float32."""
    places = mx.array(list(rows))
    is_embedding = kind_of(module) is ModuleKind.EMBEDDING
    old = module(places) if is_embedding else dense_weight(module)[places]
    delta = new.astype(mx.float32) - old.astype(mx.float32)
    chosen = (mx.arange(weight_shape(module)[0])[:, None] == places[None]).astype(mx.float32)
    magnitude = None
    if is_dora:
        magnitude = mx.linalg.norm(dense_weight(module).astype(mx.float32) + chosen @ delta, axis=-1)
    if is_embedding:
        return ModuleWeights(chosen, delta, magnitude, 1.0)
    return ModuleWeights(mx.contiguous(delta.T), mx.contiguous(chosen.T), magnitude, 1.0)


def _shown(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{shown}, …" if len(indices) > 8 else shown

"""Embeddings with one adapter, as a look-up and, where the head is tied to them, as a linear layer.

    W' = W + s·A B, (num_embeddings, dims), and the same scaled row by row for DoRA, or column by column

`lora_a` (num_embeddings, r) = A, `lora_b` (r, dims) = B. mlx-lm's DoRA has a magnitude for each token, PEFT's
(`peft.tuners.lora.dora.DoraEmbeddingLayer`) one for each feature. Bases may be quantised. Runs on the thread
that owns the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from .adapted import AdaptedLayer, DoRALayer
from .magnitudes import dora_factor
from .module_weights import ModuleWeights
from .modules import dense_weight

__all__ = ["DoRAEmbedding", "FeatureDoRAEmbedding", "LoRAEmbedding", "no_weight"]


def no_weight(embedding: nn.Module) -> UnsupportedModelError:
    """What to raise where a model reads the weight of an adapted embedding, past its adapter."""
    return UnsupportedModelError(
        [f"the model reads the weight of its {type(embedding).__name__} itself, which no adapter can change"]
    )


class _AdaptedEmbedding(AdaptedLayer):
    BASE = "embedding"
    embedding: Any

    @property
    def weight(self) -> mx.array:
        """None: a head that is tied by the weight would leave the adapter out.

        Raises:
            UnsupportedModelError: always.
        """
        raise no_weight(self.embedding)

    def _head_update(self, x: mx.array) -> mx.array:
        z = (self.dropout(x) @ self.lora_b.T) @ self.lora_a.T
        return (self.scale * z).astype(x.dtype)

    def _delta(self) -> mx.array:
        return self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)


class LoRAEmbedding(_AdaptedEmbedding):
    """An `nn.Embedding` or `nn.QuantizedEmbedding` with a LoRA. Forward: tokens (…) → (…, dims)."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding(x)
        if self.head_only:
            return y
        z = self.dropout(self.lora_a[x] @ self.lora_b)
        return y + (self.scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dims) → (…, num_embeddings)."""
        y = self.embedding.as_linear(x)
        return y if self.lookup_only else y + self._head_update(x)


class DoRAEmbedding(_AdaptedEmbedding, DoRALayer):
    """An `nn.Embedding` or `nn.QuantizedEmbedding` with a DoRA. Forward: tokens (…) → (…, dims)."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding(x)
        if self.head_only:
            return y
        z = self.scale * (self.lora_a[x] @ self.lora_b)
        factor = self._settled_factor()
        if factor is not None:
            factor = factor[x]
        else:
            norm = mx.stop_gradient(mx.linalg.norm((y + z).astype(mx.float32), axis=-1))
            factor = dora_factor(self.m[x], norm)
        return factor[..., None].astype(y.dtype) * (y + self.dropout(z).astype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dims) → (…, num_embeddings)."""
        y = self.embedding.as_linear(x)
        return y if self.lookup_only else self._factor().astype(y.dtype) * (y + self._head_update(x))


class FeatureDoRAEmbedding(_AdaptedEmbedding, DoRALayer):
    """An embedding with a DoRA as PEFT has it: `m` (dims,), the norms those of the columns of W + s·A B.

    Forward: tokens (…) → (…, dims).
    """

    def __init__(self, base: nn.Module, weights: ModuleWeights, dropout: float) -> None:
        """As PEFT begins, `m` are the norms of W's columns where `weights` have no magnitudes."""
        if weights.magnitude is None:
            norm = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=0)
            weights = replace(weights, magnitude=norm)
        super().__init__(base, weights, dropout)

    @property
    def weights(self) -> ModuleWeights:
        """The factors as they are now."""
        return replace(super().weights, by_feature=True)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding(x)
        z = self.scale * self.dropout(self.lora_a[x] @ self.lora_b)
        return self._factor().astype(y.dtype) * (y + z.astype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dims) → (…, num_embeddings)."""
        if self.lookup_only:
            return self.embedding.as_linear(x)
        x = x * self._factor().astype(x.dtype)
        return self.embedding.as_linear(x) + self._head_update(x)

    def fused_weight(self) -> mx.array:
        """(W + s·A B) ⊙ m / ‖·‖, float32."""
        return self._adapted_weight() * self._computed_factor().astype(mx.float32)

    def _computed_factor(self) -> mx.array:
        return dora_factor(self.m, mx.stop_gradient(mx.linalg.norm(self._adapted_weight(), axis=0)))

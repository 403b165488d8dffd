"""Embeddings with one adapter, as a look-up and, where the head is tied to them, as a linear layer.

    W' = W + s·A B, (num_embeddings, dims), and the same scaled row by row for DoRA

`lora_a` (num_embeddings, r) = A, `lora_b` (r, dims) = B. Bases may be quantised. Runs on the thread that owns
the model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from .adapted import AdaptedLayer, DoRALayer

__all__ = ["DoRAEmbedding", "LoRAEmbedding", "no_weight"]


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
        z = self.scale * (self.lora_a[x] @ self.lora_b)
        factor = self._settled_factor()
        if factor is not None:
            factor = factor[x]
        else:
            factor = self.m[x] / mx.stop_gradient(mx.linalg.norm((y + z).astype(mx.float32), axis=-1))
        return factor[..., None].astype(y.dtype) * (y + self.dropout(z).astype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, dims) → (…, num_embeddings)."""
        y = self.embedding.as_linear(x)
        return y if self.lookup_only else self._factor().astype(y.dtype) * (y + self._head_update(x))

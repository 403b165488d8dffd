"""Embeddings that serve rows with different adapters, and with none, in one forward.

    W' = W + w·s·A B as rows to look up, and as the matrix of a head that is tied to it

The factors lie as those of the tied head do, a linear layer with the tokens as its outputs: its A is Bᵀ, its
B is Aᵀ. So the head is a MixedLinear, and a look-up takes columns of its B. Runs on the thread that owns the
model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from ..layers.embedding import no_weight
from .linear import MixedLinear, ProjectionGroup
from .plan import Pass
from .stacks import Stack

__all__ = ["MixedEmbedding", "TiedHead"]


class TiedHead(nn.Module):
    """An embedding in the guise of the linear layer that its `as_linear` is; it has no bias."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self._as_linear = embedding.as_linear
        self._get = embedding.get

    def __call__(self, x: mx.array) -> mx.array:
        return self._as_linear(x)

    def get(self, key: str, default: Any = None) -> Any:
        """What the embedding has of this name."""
        return self._get(key, default)


class MixedEmbedding(nn.Module):
    """An `nn.Embedding` or `nn.QuantizedEmbedding` beside the factors of every adapter that adapts it.

    Forward: tokens (B, L) → (B, L, dims), axis 0 being the rows of the batch. Without a plan, or where the
    batch's adapters do not touch this embedding, it is the base's own forward.
    """

    embedding: Any

    def __init__(self, path: str, embedding: nn.Module, group: ProjectionGroup) -> None:
        super().__init__()
        self.embedding = embedding
        self._path = path
        self._group = group
        self._head = MixedLinear(path, TiedHead(embedding), group).__call__

    def reverted(self) -> nn.Module:
        """The base embedding, the very module that was wrapped."""
        return self.embedding

    @property
    def weight(self) -> mx.array:
        """None: a head that is tied by the weight would leave the adapters out.

        Raises:
            UnsupportedModelError: always.
        """
        raise no_weight(self.embedding)

    def as_linear(self, x: mx.array) -> mx.array:
        """x (B, L, dims) → (B, L, num_embeddings).

        Raises:
            UnsupportedModelError: a DoRA that scales features is to change the head as well.
        """
        plan = self._group.routing.plan
        if plan is not None and any(stack.layout.by_feature for _, stack in self._group.work(plan).products):
            raise UnsupportedModelError([f"{self._path}: a DoRA by feature is served for look-ups alone"])
        return self._head(x)

    def __call__(self, tokens: mx.array) -> mx.array:
        plan = self._group.routing.plan
        y = self.embedding(tokens)
        if plan is None:
            return y
        steps = self._group.work(plan).lookups
        if steps and (tokens.ndim != 2 or tokens.shape[0] != plan.batch_size):
            raise UnsupportedModelError(
                [
                    f"{self._path} gets tokens of shape {tokens.shape}; expected "
                    f"({plan.batch_size}, length), the rows of the batch on axis 0"
                ]
            )
        for one, stack in steps:
            y = self._add(y, tokens, one, stack)
        return y

    def _add(self, y: mx.array, tokens: mx.array, one: Pass, stack: Stack) -> mx.array:
        """y (B, L, dims) with the term of this pass added to the rows concerned."""
        layout = stack.layout
        tokens, slots = one.of(tokens), one.slots[:, None]
        # As (slots, tokens, rank), so that the row of one token is what a slot and a token name.
        h = stack.b(self._path).swapaxes(-1, -2)[slots, tokens]
        is_last = one.is_weighted and layout.weighs_last
        if one.is_weighted and not is_last:
            h = h * one.weights(layout.dtype)
        a = stack.a()[one.slots] if one.slot is None else stack.a(one.slot)
        z = one.weighted(h @ a) if is_last else h @ a
        new = one.of(y) + z.astype(y.dtype)
        if layout.is_dora:
            factor = stack.factor(self._path)
            factor = factor[slots] if layout.by_feature else factor[slots, tokens][..., None]
            new = factor.astype(y.dtype) * new
        return one.replaced(y, new)

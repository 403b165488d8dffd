"""A linear layer that serves rows with different adapters, and with none, in one forward.

    LoRA (arXiv:2106.09685)   y = W x + w·s·B A x
    DoRA (arXiv:2402.09353)   y = f ⊙ (W x + s·B A x) + bias,   f = m / ‖W + s·B A‖ row by row

with the factors of all resident adapters stacked, so that one `gather_mm` reads each row's own. `f`
depends on weights alone and is computed when the adapter is prepared. Runs on the thread that owns the
model; which rows use what comes from the Routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedModelError
from .routing import Placement, ResidentAdapter, Routing, RowGroup, StackKey

__all__ = ["LayerFactors", "MixedLinear", "padded_rank"]

_SMALLEST_RANK = 4


def padded_rank(rank: int) -> int:
    """The rank that factors are padded to, so that near ranks share a stack: the next power of two."""
    return max(_SMALLEST_RANK, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """What one adapter brings to one layer, evaluated.

    `a` (R, in) and `b` (R, out) with R the padded rank and zeros beyond the true one; for DoRA,
    `factor` (out,) is m / ‖W + s·B A‖ in the layer's compute dtype. `scale` is s.
    """

    a: mx.array
    b: mx.array
    scale: float
    factor: mx.array | None = None

    @property
    def key(self) -> StackKey:
        """The stack that these factors belong to."""
        return StackKey("lora" if self.factor is None else "dora", self.a.shape[0], self.a.dtype)

    def arrays(self) -> list[mx.array]:
        """The arrays in the order of a stack's."""
        return [self.a, self.b] if self.factor is None else [self.a, self.b, self.factor]


class _Stack:
    """The factors of several adapters of one kind, one slot each: (S, R, in), (S, R, out), (S, out)."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self.slots: dict[ResidentAdapter, int] = {}

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[0] if self.arrays else 0

    def put(self, adapter: ResidentAdapter, new: Sequence[mx.array]) -> None:
        free = min(set(range(self.capacity)).difference(self.slots.values()), default=None)
        if free is None:
            free = self.capacity
            self._grow(new, 1 + free // 8)
        for array, value in zip(self.arrays, new, strict=True):
            array[free] = value
        self.slots[adapter] = free

    def _grow(self, new: Sequence[mx.array], by: int) -> None:
        blank = [mx.zeros((by, *value.shape), dtype=value.dtype) for value in new]
        if self.arrays:
            blank = [mx.concatenate(list(pair)) for pair in zip(self.arrays, blank, strict=True)]
        self.arrays = blank

    def drop(self, adapter: ResidentAdapter) -> None:
        del self.slots[adapter]
        # Free slots are kept for the next adapters up to the share that growing leaves.
        if self.capacity > len(self.slots) + 1 + len(self.slots) // 8 or not self.slots:
            keep = mx.array(list(self.slots.values()), dtype=mx.uint32)
            self.arrays = [array[keep] for array in self.arrays] if self.slots else []
            self.slots = {kept: slot for slot, kept in enumerate(self.slots)}


class MixedLinear(nn.Module):
    """A `nn.Linear` or `nn.QuantizedLinear` beside the factors of every resident adapter that adapts it.

    Forward: x (B, …, in) → (B, …, out), axis 0 being the rows of the batch. Without a plan, or where the
    batch's adapters do not touch this layer, it is the base layer's own forward.
    """

    def __init__(self, path: str, linear: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.linear = linear
        self._path = path
        self._routing = routing
        self._stacks: dict[StackKey, _Stack] = {}
        self._placements: dict[ResidentAdapter, tuple[StackKey, float]] = {}

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was wrapped."""
        return self.linear

    @property
    def is_empty(self) -> bool:
        """Whether no resident adapter adapts this layer."""
        return not self._placements

    def put(self, adapter: ResidentAdapter, factors: LayerFactors) -> None:
        """Keep `factors` for rows that compute with `adapter`; nothing is evaluated yet."""
        self._stacks.setdefault(factors.key, _Stack()).put(adapter, factors.arrays())
        self._placements[adapter] = (factors.key, factors.scale)

    def drop(self, adapter: ResidentAdapter) -> None:
        """Forget `adapter`; nothing is evaluated yet."""
        key, _ = self._placements.pop(adapter)
        stack = self._stacks[key]
        stack.drop(adapter)
        if not stack.slots:
            del self._stacks[key]

    def placement(self, adapter: ResidentAdapter) -> Placement | None:
        """Where this layer keeps `adapter`, or None if the adapter does not touch it."""
        found = self._placements.get(adapter)
        if found is None:
            return None
        key, scale = found
        return Placement(key, self._stacks[key].slots[adapter], scale)

    def stacked_arrays(self) -> list[mx.array]:
        """All arrays of the stacks, to evaluate or to count."""
        return [array for stack in self._stacks.values() for array in stack.arrays]

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        plan = self._routing.plan
        if plan is None:
            return y
        groups = plan.groups(self)
        if not groups:
            return y
        if x.shape[0] != plan.batch_size or x.ndim < 2:
            raise UnsupportedModelError(
                [f"{self._path} gets input of shape {x.shape}; its axis 0 must be the {plan.batch_size} rows"]
            )
        shape = y.shape
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        for group in groups:
            y = self._adapt(rows, y, group)
        return y.reshape(shape)

    def _adapt(self, x: mx.array, y: mx.array, group: RowGroup) -> mx.array:
        a, b, *factor = self._stacks[group.key].arrays
        h = mx.gather_mm(
            x.astype(a.dtype), a.swapaxes(-1, -2), lhs_indices=group.rows, rhs_indices=group.slots
        )
        delta = mx.gather_mm(h * group.weights, b, rhs_indices=group.slots).astype(y.dtype)
        new = (y if group.rows is None else y[group.rows]) + delta
        if factor:
            f = factor[0][group.slots][:, None, :]
            bias = self.linear.get("bias")
            new = f * new if bias is None else f * (new - bias) + bias
        if group.select is None:
            return new
        return mx.take(mx.concatenate([y, new]), group.select, axis=0)

"""The low-rank terms of mixed rows as matrix products: the form for every device, and for reading prompts.

Where all rows of the batch have the same adapter, plain products; else `gather_mm`, which reads each row's
own factors from the stacks, or on CUDA batched products with factors that were gathered before: there
`gather_mm` would be compiled for half a minute first, and takes it for granted that matrices lie packed one
after the other, which those in a stack do not. Knows no plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .routing import Pass
from .stacks import Stack

__all__ = ["Products"]


class Products:
    """Of an input x (B, …, in): its product with A, weighted, for each pass; a layer's B when asked for."""

    def __init__(self, x: mx.array, steps: Sequence[tuple[Pass, Stack]], on_cuda: bool) -> None:
        self._x = x
        self._on_cuda = on_cuda
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        self._shrunk = [(one, stack, self._shrink(rows, one, stack)) for one, stack in steps]

    def output(self, path: str, linear: nn.Module) -> mx.array:
        """The output (B, …, out) of the layer at `path`, whose base is `linear`."""
        y = linear(self._x)
        shape = y.shape
        y = y.reshape(shape[0], -1, shape[-1])
        for one, stack, h in self._shrunk:
            if path in stack.layout.ranks:
                y = self._expand(y, h, one, stack, path, linear)
        return y.reshape(shape)

    def _gathers(self, dtype: mx.Dtype) -> bool:
        """Whether `gather_mm` can do it well: on a CPU it knows float32 alone."""
        return not self._on_cuda and (dtype == mx.float32 or mx.default_device().type == mx.DeviceType.gpu)

    def _shrink(self, x: mx.array, one: Pass, stack: Stack) -> mx.array:
        """w·s·A x of the rows concerned, (E, L, rank of all projections)."""
        a, layout = stack.a(), stack.layout
        x = x.astype(layout.dtype)
        if one.slot is not None:
            h = x @ a[one.slot].T
        elif self._gathers(layout.dtype):
            h = mx.gather_mm(x, a.swapaxes(-1, -2), lhs_indices=one.rows, rhs_indices=one.slots)
        else:
            h = (x if one.rows is None else x[one.rows]) @ a[one.slots].swapaxes(-1, -2)
        return h * one.weights(layout.dtype)

    def _expand(
        self, y: mx.array, h: mx.array, one: Pass, stack: Stack, path: str, linear: nn.Module
    ) -> mx.array:
        """y (B, L, out) with the term of this pass added to the rows concerned; h as from `_shrink`."""
        b, layout = stack.b(path), stack.layout
        if len(layout.projections) > 1:
            h = h[..., layout.ranks[path]]
        if one.slot is not None:
            delta = h @ b[one.slot]
        elif self._gathers(layout.dtype):
            delta = mx.gather_mm(h, b, rhs_indices=one.slots)
        else:
            delta = h @ b[one.slots]
        new = (y if one.rows is None else y[one.rows]) + delta.astype(y.dtype)
        if layout.is_dora:
            f = stack.factor(path)[one.slots][:, None, :].astype(y.dtype)
            bias = linear.get("bias")
            new = f * new if bias is None else f * (new - bias) + bias
        if one.select is None:
            return new
        return mx.take(mx.concatenate([y, new]), one.select, axis=0)

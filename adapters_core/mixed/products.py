"""The low-rank terms of mixed rows as matrix products: the form for every device, and for reading prompts.

Where all rows of the batch have the same adapter, plain products; where they differ, `gather_mm`, which reads
each row's own factors from the stacks, or batched products with copies of them: for B of prompts, and where
the `Forms` say so. Knows no plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .plan import Pass
from .stacks import Stack

__all__ = ["Products"]


class Products:
    """Of an input x (B, …, in) or (B·L, in): its product with A, weighted, for each pass.

    A layer's product with B is made when its output is asked for.
    """

    def __init__(
        self, x: mx.array, steps: Sequence[tuple[Pass, Stack]], batch_size: int, copies: bool
    ) -> None:
        """`copies`: factors are copied, not read by `gather_mm`, where a product has the choice."""
        self._x = x
        self._batch_size = batch_size
        self._copies = copies
        rows = _as_rows(x, batch_size)
        self._shrunk = [(one, stack, self._shrink(rows, one, stack)) for one, stack in steps]

    def output(self, path: str, linear: nn.Module) -> mx.array:
        """The output, in the form of the input, of the layer at `path`, whose base is `linear`."""
        base = linear(self._x)
        y = _as_rows(base, self._batch_size)
        for one, stack, parts in self._shrunk:
            h = parts.get(path)
            if h is not None:
                y = self._expand(y, h, one, stack, path, linear)
        return y if base.ndim == 3 else y.reshape(base.shape)

    def _gathers(self, dtype: mx.Dtype) -> bool:
        """Whether `gather_mm` can do it well: on a CPU it knows float32 alone."""
        return not self._copies and (dtype == mx.float32 or mx.default_device().type == mx.DeviceType.gpu)

    def _shrink(self, x: mx.array, one: Pass, stack: Stack) -> dict[str, mx.array]:
        """A x of the rows concerned, (E, L, rank), for each projection by path; weighted, if not last."""
        layout = stack.layout
        x = x.astype(layout.dtype)
        if one.slot is not None:
            h = x @ stack.a(one.slot).T
        elif self._gathers(layout.dtype):
            h = mx.gather_mm(x, stack.a().swapaxes(-1, -2), one.rows, one.slots)
        else:
            h = one.of(x) @ stack.a()[one.slots].swapaxes(-1, -2)
        if one.is_weighted and not layout.weighs_last:
            h = h * one.weights(layout.dtype)
        if len(layout.ranks) == 1:
            return dict.fromkeys(layout.ranks, h)
        return dict(zip(layout.ranks, mx.split(h, layout.splits, axis=-1), strict=True))

    def _expand(
        self, y: mx.array, h: mx.array, one: Pass, stack: Stack, path: str, linear: nn.Module
    ) -> mx.array:
        """y (B, L, out) with the term of this pass added to the rows concerned; h as from `_shrink`."""
        layout = stack.layout
        old = one.of(y)
        is_last = one.is_weighted and layout.weighs_last
        if one.slot is None and h.shape[1] == 1 and self._gathers(layout.dtype):
            z = mx.gather_mm(h, stack.b(path), None, one.slots)
            new = old + (one.weighted(z) if is_last else z).astype(y.dtype)
        else:
            # B is small beside the outputs of a prompt, so that gathering it costs less than a sum apart.
            b = stack.b(path)[one.slots] if one.slot is None else stack.b(path, one.slot)
            if y.dtype == b.dtype and not is_last:
                new = mx.addmm(old, h, b)
            else:
                z = h @ b
                new = old + (one.weighted(z) if is_last else z).astype(y.dtype)
        if layout.has_bias:
            added = stack.bias(path)[one.slots][:, None, :]
            added = one.weighted(added) if one.is_weighted else added
            new = new + added.astype(y.dtype)
        if layout.is_dora:
            f = stack.factor(path)[one.slots][:, None, :].astype(y.dtype)
            bias = linear.get("bias")
            new = f * new if bias is None else f * (new - bias) + bias
        return one.replaced(y, new)


def _as_rows(x: mx.array, batch_size: int) -> mx.array:
    """(B, …, n) or (B·L, n) as (B, L, n)."""
    return x if x.ndim == 3 else x.reshape(batch_size, -1, x.shape[-1])

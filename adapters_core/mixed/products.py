"""The low-rank terms of mixed rows as matrix products: the form for every device, and for reading prompts.

Where all rows of the batch have the same adapter, plain products; where they differ, `gather_mm`, which reads
each row's own factors from the stacks, or batched products with copies of them: for B of prompts, and where
the `Forms` say so. Knows no plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .plan import Pass
from .rounds import Round
from .stacks import Stack

__all__ = ["Products"]


class Products:
    """Of an input x (B, …, in) or (B·L, in): its product with A, weighted, for each pass.

    A layer's product with B is made when its output is asked for.
    """

    def __init__(
        self,
        x: mx.array,
        steps: Sequence[tuple[Pass, Stack]],
        rounds_at: Callable[[str], tuple[Round, ...]],
        batch_size: int,
        copies: bool,
    ) -> None:
        """`rounds_at` gives the rounds of `steps` that a layer has, by its path.

        `copies`: factors are copied, not read by `gather_mm`, where a product has the choice.
        """
        self._x = x
        self._batch_size = batch_size
        self._copies = copies
        self._rounds_at = rounds_at
        rows = _as_rows(x, batch_size)
        self._shrunk = [(one, stack, self._shrink(rows, one, stack)) for one, stack in steps]

    def output(self, path: str, linear: nn.Module) -> mx.array:
        """The output, in the form of the input, of the layer at `path`, whose base is `linear`."""
        base = linear(self._x)
        y = _as_rows(base, self._batch_size)
        for one in self._rounds_at(path):
            y = self._added(y, one, path, linear)
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

    def _added(self, y: mx.array, one: Round, path: str, linear: nn.Module) -> mx.array:
        """y (B, L, out) with the terms of this round; rows that have none keep their bits."""
        steps = [self._shrunk[number] for number in one.numbers]
        new = self._fused(y, one, path)
        if new is None:
            new = y + one.spread([self._term(*step, path, y.dtype) for step in steps])
        if one.has_dora:
            slots = [(of.slots, stack) for of, stack, _ in steps if stack.layout.is_dora]
            f = one.spread_dora([stack.factor(path)[each][:, None, :] for each, stack in slots])
            f, bias = f.astype(y.dtype), linear.get("bias")
            scaled = f * new if bias is None else f * (new - bias) + bias
            new = scaled if one.dora is None else mx.where(one.dora, scaled, new)
        return one.kept(new, y)

    def _fused(self, y: mx.array, one: Round, path: str) -> mx.array | None:
        """y (B, L, out) plus the term of all its rows in one operation; None where it takes more."""
        of, stack, parts = self._shrunk[one.numbers[0]]
        layout, h = stack.layout, parts[path]
        reads = of.slot is not None or h.shape[1] > 1 or not self._gathers(layout.dtype)
        if not one.covers_in_order or not reads or y.dtype != layout.dtype or layout.has_bias:
            return None
        if of.is_weighted and layout.weighs_last:
            return None
        return mx.addmm(y, h, stack.b(path)[of.slots] if of.slot is None else stack.b(path, of.slot))

    def _term(
        self, one: Pass, stack: Stack, parts: dict[str, mx.array], path: str, dtype: mx.Dtype
    ) -> mx.array:
        """What is added to the base output of the rows concerned, (E, L, out); `parts` as from `_shrink`."""
        layout, h = stack.layout, parts[path]
        if one.slot is not None:
            z = h @ stack.b(path, one.slot)
        elif h.shape[1] == 1 and self._gathers(layout.dtype):
            z = mx.gather_mm(h, stack.b(path), None, one.slots)
        else:
            # B is small beside the outputs of a prompt, so that gathering it costs less than a sum apart.
            z = h @ stack.b(path)[one.slots]
        if one.is_weighted and layout.weighs_last:
            z = one.weighted(z)
        if layout.has_bias:
            added = stack.bias(path)[one.slots][:, None, :]
            z = z + (one.weighted(added) if one.is_weighted else added)
        return z.astype(dtype)


def _as_rows(x: mx.array, batch_size: int) -> mx.array:
    """(B, …, n) or (B·L, n) as (B, L, n)."""
    return x if x.ndim == 3 else x.reshape(batch_size, -1, x.shape[-1])

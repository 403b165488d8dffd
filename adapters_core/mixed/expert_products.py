"""The low-rank terms of experts for mixed rows: a product with one matrix for each pair of token and expert.

Where all rows of the batch have the same adapter, the matrices are its own experts', in the order that the
base layer uses; where they differ, those of all slots' experts. On CUDA, `gather_mm` takes it for granted
that matrices lie packed one after the other, as those of one slot do and those of a stack do not: there, few
pairs' matrices are gathered before, and many pairs are computed slot by slot. Knows no plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..layers.switch import gather_mm
from .plan import Pass
from .stacks import Stack

__all__ = ["ExpertProducts", "Routes"]

_MOST_GATHERED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Routes:
    """Which expert each pair computes with, and which row of the batch it belongs to, in one shape.

    `numbers` are what both were taken from.
    """

    numbers: mx.array
    experts: mx.array
    rows: mx.array


@dataclass(frozen=True, slots=True)
class _Term:
    """One pass: which slot each pair has, whether it has one (None: all have), and its products with A.

    `weights` (…, 1, 1) of the pairs are float32, None where all are 1.
    """

    one: Pass
    stack: Stack
    slots: mx.array | None
    concerned: mx.array | None
    weights: mx.array | None
    shrunk: dict[str, mx.array]


class ExpertProducts:
    """Of an input x (…, 1, in): its product with A, weighted, for each pass; a layer's B when asked for."""

    def __init__(
        self,
        x: mx.array,
        routes: Routes,
        steps: Sequence[tuple[Pass, Stack]],
        sorted_indices: bool,
        on_cuda: bool,
        most_gathered_bytes: int = _MOST_GATHERED_BYTES,
    ) -> None:
        self.x = x
        self.routes = routes
        self._sorted = sorted_indices
        self._on_cuda = on_cuda
        self._most_gathered_bytes = most_gathered_bytes
        self._terms = [self._term(one, stack) for one, stack in steps]

    def added(self, path: str, y: mx.array) -> mx.array:
        """y (…, 1, out), the base output of the layer at `path`, with its terms."""
        for term in self._terms:
            h = term.shrunk.get(path)
            if h is None:
                continue
            z = self._product(h, term, path)
            if term.weights is not None and term.stack.layout.weighs_last:
                z = z * term.weights
            new = y + z.astype(y.dtype)
            y = new if term.concerned is None else mx.where(term.concerned[..., None, None], new, y)
        return y

    def _term(self, one: Pass, stack: Stack) -> _Term:
        layout = stack.layout
        slots = concerned = weights = None
        packed = None if one.slot is not None and not one.is_weighted else one.packed[self.routes.rows]
        if one.slot is None and packed is not None:
            slots = mx.maximum(packed[..., 0], 0).astype(mx.uint32)
            concerned = None if one.rows is None else packed[..., 0] >= 0
        if one.is_weighted and packed is not None:
            weights = packed[..., 1].view(mx.float32)[..., None, None]
        term = _Term(one, stack, slots, concerned, weights, {})
        h = self._product(self.x.astype(layout.dtype), term, None)
        if weights is not None and not layout.weighs_last:
            h = h * weights.astype(h.dtype)
        parts = mx.split(h, layout.splits, axis=-1) if layout.splits else [h]
        term.shrunk.update(zip(layout.ranks, parts, strict=True))
        return term

    def _product(self, x: mx.array, term: _Term, path: str | None) -> mx.array:
        """x times A of the whole group, or times B of the layer at `path`, with each pair's own factors."""
        stack, experts, slots = term.stack, self.routes.experts, term.slots

        def matrices(slot: int | None) -> mx.array:
            return stack.a(slot).swapaxes(-1, -2) if path is None else stack.b(path, slot)

        if slots is None:
            return gather_mm(x, matrices(term.one.slot), experts, self._sorted)
        if not self._on_cuda:
            return gather_mm(x, matrices(None), slots * stack.layout.matrices + experts)
        found = matrices(None)
        size = found.shape[-1] * found.shape[-2] * found.dtype.size
        if experts.size * size <= self._most_gathered_bytes:
            return x @ found[slots, experts]
        total: mx.array | None = None
        for slot in sorted(set(term.one.slot_numbers)):
            own = gather_mm(x, matrices(slot), experts, self._sorted)
            total = own if total is None else mx.where((slots == slot)[..., None, None], own, total)
        if total is None:
            raise ValueError("a pass has at least one row")
        return total

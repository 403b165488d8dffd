"""Which rows of a batch one launch of a CUDA kernel serves, and where each finds its factors.

A launch takes rows of any layouts of one dtype: its kernel reads from two small arrays what a layout says. So
no kernel is compiled for a layout, and rows of many layouts cost no more launches than those of one. A row's
second term, that of a blend, falls into a second launch. Knows no CUDA.

    rows   (B, 4) int32: the stack's number, -1 where the row has no term; its slot; the bits of its float32
           weight; 0
    table  (8 + 16·stacks,) int32: the output size of each projection, 0 where there is none; the input
           size; the rank of the longest row; then for each stack the size of a slot, the rank of all
           projections, two noughts, and for each projection its rank, where its part of A x begins, where
           its B begins in a slot, and where its DoRA factors begin, -1 without
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .layout import GroupLayout
from .plan import Pass
from .stacks import Stack

__all__ = ["MOST_PROJECTIONS", "MOST_STACKS", "STACK_NUMBERS", "TABLE_START", "Launch", "plan_launches"]

MOST_PROJECTIONS = 3
MOST_STACKS = 16
TABLE_START = 8
STACK_NUMBERS = 16
_PLACE_START = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """Rows with at most one term each: `paths` are the projections in the order of the table.

    `sizes` are their output sizes, `rank` is the most that a row's projections have together.
    """

    stacks: tuple[Stack, ...]
    paths: tuple[str, ...]
    in_size: int
    sizes: tuple[int, ...]
    rank: int
    rows: mx.array
    table: mx.array

    @property
    def dtype(self) -> mx.Dtype:
        """That of the factors."""
        return self.stacks[0].layout.dtype


@dataclass(slots=True)
class _Terms:
    """The terms that fall into one launch: by row, the stack's number, the slot and the weight."""

    stacks: list[Stack] = field(default_factory=list)
    rows: dict[int, tuple[int, int, float]] = field(default_factory=dict)

    def takes(self, stack: Stack) -> bool:
        """Whether terms of `stack` may join."""
        if stack in self.stacks:
            return True
        same = not self.stacks or self.stacks[0].layout.dtype == stack.layout.dtype
        return same and len(self.stacks) < MOST_STACKS

    def add(self, stack: Stack, row: int, slot: int, weight: float) -> None:
        """One term more."""
        if stack not in self.stacks:
            self.stacks.append(stack)
        self.rows[row] = self.stacks.index(stack), slot, weight


def plan_launches(
    steps: Sequence[tuple[Pass, Stack]], batch_size: int, known: dict[bytes, mx.array]
) -> tuple[Launch, ...]:
    """The launches for `steps`, in order: a row's terms are added in the order of the steps.

    `known` holds arrays that were made before, by their numbers: those of a model's layers are mostly alike.
    """
    launches: list[_Terms] = []
    after: dict[int, int] = {}  # by row, the first launch that its next term may fall into
    for one, stack in steps:
        for row, slot, weight in one.entries:
            at = after.get(row, 0)
            while at < len(launches) and not launches[at].takes(stack):
                at += 1
            if at == len(launches):
                launches.append(_Terms())
            launches[at].add(stack, row, slot, weight)
            after[row] = at + 1
    return tuple(_launch(terms, batch_size, known) for terms in launches)


def _launch(terms: _Terms, batch_size: int, known: dict[bytes, mx.array]) -> Launch:
    layouts = [stack.layout for stack in terms.stacks]
    sizes = {p.path: p.out_size for layout in layouts for p in layout.projections}
    paths = tuple(sorted(sizes))
    rank = max(layout.rank for layout in layouts)
    rows = np.zeros((batch_size, 4), dtype=np.int32)
    rows[:, 0] = -1
    for row, (stack, slot, weight) in terms.rows.items():
        rows[row, :3] = stack, slot, np.float32(weight).view(np.int32)
    table = np.zeros(TABLE_START + STACK_NUMBERS * len(layouts), dtype=np.int32)
    table[: len(paths)] = [sizes[path] for path in paths]
    table[MOST_PROJECTIONS : MOST_PROJECTIONS + 2] = layouts[0].in_size, rank
    for at, layout in enumerate(layouts):
        start = TABLE_START + STACK_NUMBERS * at
        table[start : start + STACK_NUMBERS] = _numbers(layout, paths)
    return Launch(
        tuple(terms.stacks),
        paths,
        layouts[0].in_size,
        tuple(sizes[path] for path in paths),
        rank,
        _array(rows, known),
        _array(table, known),
    )


def _numbers(layout: GroupLayout, paths: Sequence[str]) -> list[int]:
    """What the table says of one stack."""
    ranks: Mapping[str, slice] = layout.ranks
    numbers = [layout.size, layout.rank, 0, 0]
    for path in paths:
        if path in ranks:
            factor = layout.factors[path].start if layout.is_dora else -1
            part = ranks[path]
            numbers += [part.stop - part.start, part.start, layout.b[path].start, factor]
        else:
            numbers += [0, 0, 0, -1]
    return numbers + [0] * (STACK_NUMBERS - len(numbers))


def _array(numbers: np.ndarray, known: dict[bytes, mx.array]) -> mx.array:
    key = bytes(str(numbers.shape), "ascii") + numbers.tobytes()
    if key not in known:
        known[key] = mx.array(numbers)
    return known[key]

"""Which rows of a batch one launch of a CUDA kernel serves, and where each finds its factors.

A launch takes rows of any layouts of one dtype: its kernel reads from two small arrays what a layout says. So
no kernel is compiled for a layout, and rows of many layouts cost no more launches than those of one. A row's
second term, that of a blend, falls into a second launch. Knows no CUDA.

    rows   (B, 4) int32: the stack's number, -1 where the row has no term; its slot; the bits of its float32
           weight; 0
    table  (8 + 16·stacks,) int32: the output size of each projection, 0 where there is none; the input
           size; the rank of the longest row; then for each stack the size of a slot, the rank of all
           projections, two zeros, and for each projection its rank, where its part of A x begins, where
           its B begins in a slot, and where its DoRA factors begin, -1 without
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .layout import GroupLayout
from .plan import BatchPlan, Pass
from .stacks import Stack

__all__ = [
    "MOST_PROJECTIONS",
    "STACK_COUNTS",
    "STACK_NUMBERS",
    "TABLE_START",
    "Launch",
    "make_launch",
    "plan_launches",
]

MOST_PROJECTIONS = 3
STACK_COUNTS = (4, 16)
"""How many stacks a kernel may be given: each number has a kernel of its own."""
TABLE_START = 8
STACK_NUMBERS = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """Rows with at most one term each: `paths` are the projections in the order of the table.

    `stacks` are as many as one of `STACK_COUNTS`: in the places that are left, the first again. `sizes` are
    the projections' output sizes, `rank` is the most that a row's projections have together.
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

    @property
    def slabs(self) -> list[mx.array]:
        """Those of the stacks; not to be kept beyond a forward, since slots are written in place."""
        return [stack.slab for stack in self.stacks]


@dataclass(slots=True)
class _Terms:
    """The terms that fall into one launch: the steps that they are of, and (step, slot, weight) by row."""

    dtype: mx.Dtype
    steps: list[int] = field(default_factory=list)
    rows: dict[int, tuple[int, int, float]] = field(default_factory=dict)


def plan_launches(steps: Sequence[tuple[Pass, Stack]], plan: BatchPlan) -> tuple[Launch, ...]:
    """The launches for `steps`, in order: a row's terms are added in the order of the steps.

    Which rows a launch has is worked out once for all groups of a plan whose steps are of the same passes and
    dtypes, and so is each table: those of a model's layers are alike.
    """
    kinds = tuple((one, stack.layout.dtype) for one, stack in steps)
    dealt = plan.work(kinds, lambda plan: _deal(kinds, plan.batch_size))
    return tuple(make_launch([steps[at][1] for at in at_steps], rows, plan) for at_steps, rows in dealt)


def _deal(kinds: Sequence[tuple[Pass, mx.Dtype]], batch_size: int) -> list[tuple[list[int], mx.array]]:
    """For each launch the steps whose stacks it is given, and its rows."""
    launches: list[_Terms] = []
    after: dict[int, int] = {}  # by row, the first launch that its next term may fall into
    for step, (one, dtype) in enumerate(kinds):
        for row, slot, weight in one.entries:
            at = after.get(row, 0)
            while at < len(launches) and not _takes(launches[at], step, dtype):
                at += 1
            if at == len(launches):
                launches.append(_Terms(dtype))
            terms = launches[at]
            if step not in terms.steps:
                terms.steps.append(step)
            terms.rows[row] = terms.steps.index(step), slot, weight
            after[row] = at + 1
    return [(terms.steps, _rows(terms, batch_size)) for terms in launches]


def _takes(terms: _Terms, step: int, dtype: mx.Dtype) -> bool:
    return step in terms.steps or (terms.dtype == dtype and len(terms.steps) < STACK_COUNTS[-1])


def _rows(terms: _Terms, batch_size: int) -> mx.array:
    rows = np.zeros((batch_size, 4), dtype=np.int32)
    rows[:, 0] = -1
    for row, (stack, slot, weight) in terms.rows.items():
        rows[row, :3] = stack, slot, np.float32(weight).view(np.int32)
    return mx.array(rows)


def make_launch(stacks: Sequence[Stack], rows: mx.array, plan: BatchPlan) -> Launch:
    """The launch of `rows`, an array as above, whose stacks have these numbers."""
    layouts = [stack.layout for stack in stacks]
    sizes = {p.path: p.out_size for layout in layouts for p in layout.projections}
    paths = tuple(sorted(sizes))
    rank = max(layout.rank for layout in layouts)
    numbers = [*(sizes[path] for path in paths), *[0] * (MOST_PROJECTIONS - len(paths))]
    numbers += [layouts[0].in_size, rank]
    numbers += [0] * (TABLE_START - len(numbers))
    for layout in layouts:
        numbers += _numbers(layout, paths)
    table = plan.work(tuple(numbers), lambda _: mx.array(numbers, dtype=mx.int32))
    count = next(count for count in STACK_COUNTS if len(stacks) <= count)
    return Launch(
        stacks=(*stacks, *[stacks[0]] * (count - len(stacks))),
        paths=paths,
        in_size=layouts[0].in_size,
        sizes=tuple(sizes[path] for path in paths),
        rank=rank,
        rows=rows,
        table=table,
    )


def _numbers(layout: GroupLayout, paths: Sequence[str]) -> list[int]:
    """What the table says of one stack."""
    numbers = [layout.size, layout.rank, 0, 0]
    for path in paths:
        if path in layout.ranks:
            part = layout.ranks[path]
            factor = layout.factors[path].start if layout.is_dora else -1
            numbers += [part.stop - part.start, part.start, layout.b[path].start, factor]
        else:
            numbers += [0, 0, 0, -1]
    return numbers + [0] * (STACK_NUMBERS - len(numbers))

"""Passes that have no row in common form a round: their terms are put into the batch together.

Each layout of a batch is a pass of its own. The outputs of a layer are rebuilt once for a round and not once
for a pass. Knows no models. Pure, but for arrays of indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .plan import Pass
from .stacks import Stack

__all__ = ["Round", "rounds_of"]


class Round:
    """`numbers` are those of the passes in the list that the round was made from.

    `covers_in_order` says whether it is one pass that serves all rows of the batch in their order. `dora`
    (B, 1, 1) bool says which rows have DoRA; None if all have.
    """

    def __init__(self, numbers: Sequence[int], steps: Sequence[tuple[Pass, Stack]], batch_size: int) -> None:
        self.numbers = tuple(numbers)
        rows = [row for one, _ in steps for row, _, _ in one.entries]
        doras = [row for one, stack in steps if stack.layout.is_dora for row, _, _ in one.entries]
        self.has_dora = bool(doras)
        self.covers_in_order = len(steps) == 1 and rows == list(range(batch_size))
        self.dora = _mask(doras, batch_size)
        self._concerned = _mask(rows, batch_size)
        self._places = _places(rows, batch_size)
        self._dora_places = _places(doras, batch_size)

    def spread(self, parts: Sequence[mx.array]) -> mx.array:
        """(B, …) from what each pass has for its rows, (E, …); rows of no pass get another row's."""
        return _spread(parts, self._places)

    def spread_dora(self, parts: Sequence[mx.array]) -> mx.array:
        """As `spread`, from the `parts` of the passes with DoRA alone."""
        return _spread(parts, self._dora_places)

    def kept(self, new: mx.array, old: mx.array) -> mx.array:
        """`new` (B, …) for the rows of the round; the others keep the bits of `old` (B, …)."""
        return new if self._concerned is None else mx.where(self._concerned, new, old)


def rounds_of(steps: Sequence[tuple[int, tuple[Pass, Stack]]], batch_size: int) -> tuple[Round, ...]:
    """The numbered `steps` in their order; a new round begins where a row comes again."""
    found: list[list[tuple[int, tuple[Pass, Stack]]]] = []
    taken: set[int] = set()
    for number, step in steps:
        rows = {row for row, _, _ in step[0].entries}
        if not found or taken & rows:
            found.append([])
            taken = set()
        found[-1].append((number, step))
        taken |= rows
    return tuple(Round([n for n, _ in own], [step for _, step in own], batch_size) for own in found)


def _spread(parts: Sequence[mx.array], places: mx.array | None) -> mx.array:
    together = parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
    return together if places is None else mx.take(together, places, axis=0)


def _places(rows: Sequence[int], batch_size: int) -> mx.array | None:
    """(B,) uint32: where in `rows` each row of the batch is, 0 where it is not; None if they are in order."""
    if list(rows) == list(range(batch_size)):
        return None
    at = {row: place for place, row in enumerate(rows)}
    return mx.array([at.get(row, 0) for row in range(batch_size)], dtype=mx.uint32)


def _mask(rows: Sequence[int], batch_size: int) -> mx.array | None:
    """(B, 1, 1) bool: which rows of the batch are in `rows`; None if all are."""
    if len(rows) == batch_size:
        return None
    own = set(rows)
    return mx.array([row in own for row in range(batch_size)]).reshape(-1, 1, 1)

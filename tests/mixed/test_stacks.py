"""Slots of a layout: one number for an adapter in every stack, also when a stack cannot be copied."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.mixed.layout import GroupLayout, Layout, Projection
from adapters_core.mixed.residents import ResidentAdapter
from adapters_core.mixed.stacks import Shelf

GROUPS = {
    path: GroupLayout((Projection(path, 4, size, size),), False, mx.float16)
    for path, size in {"one": 8, "other": 16}.items()
}


def filled(adapters: int) -> tuple[Shelf, list[ResidentAdapter]]:
    """A shelf whose rows are filled with the numbers of their adapters."""
    shelf = Shelf(Layout(GROUPS))
    residents = [ResidentAdapter(f"sha256:{n}", "lora", 4, 1.0, tuple(GROUPS), 0) for n in range(adapters)]
    for number, resident in enumerate(residents):
        rows = {
            name: mx.full((group.size,), number, dtype=mx.float16)
            for name, group in shelf.layout.groups.items()
        }
        shelf.put(resident, rows)
    return shelf, residents


def numbers(shelf: Shelf) -> list[set[float]]:
    """What the rows of each adapter are filled with, in the order of their slots."""
    rows = [shelf.rows_of(one) for one in sorted(shelf.slots, key=lambda one: shelf.slots[one])]
    return [set(np.concatenate([np.array(row) for row in each.values()]).tolist()) for each in rows]


def test_gaps_are_closed_in_all_stacks_at_once() -> None:
    shelf, residents = filled(8)
    before = shelf.size_bytes
    assert not shelf.drop(residents[2])  # one empty slot is kept for the next
    assert shelf.drop(residents[5])
    assert sorted(shelf.slots.values()) == list(range(6))
    assert numbers(shelf) == [{number} for number in (0, 1, 3, 4, 6, 7)]
    assert shelf.size_bytes == before * 6 // 8


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="what fails here is computed there")
def test_a_stack_that_cannot_be_copied_leaves_all_slots_as_they_are() -> None:
    """As without memory for it; here, the second stack depends on a product that a CPU does not have."""
    shelf, residents = filled(8)
    stack = shelf.stacks["other"]
    whole, index = stack.slab, mx.arange(8, dtype=mx.uint32)
    unit = mx.eye(whole.shape[1], dtype=mx.float16)[None]
    stack.slab = mx.gather_mm(whole[:, None], unit, rhs_indices=mx.zeros_like(index))[:, 0]
    dropped = residents[2:5]
    assert [shelf.drop(one) for one in dropped] == [False, False, False]
    assert list(shelf.slots.values()) == [0, 1, 5, 6, 7]
    stack.slab = whole
    assert numbers(shelf) == [{number} for number in (0, 1, 5, 6, 7)]
    assert (
        shelf.put(
            dropped[0], {name: mx.zeros(group.size, dtype=mx.float16) for name, group in GROUPS.items()}
        )
        == 2
    )
    assert shelf.drop(dropped[0])
    assert numbers(shelf) == [{number} for number in (0, 1, 5, 6, 7)]
    assert sorted(shelf.slots.values()) == list(range(5))

"""Rounds of passes: rows of many layouts in one batch, each as alone, and those with none bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_core.mixed.layout import Factors, GroupLayout, Layout, Projection
from adapters_core.mixed.plan import BatchPlan, Pass, Placement
from adapters_core.mixed.products import Products
from adapters_core.mixed.residents import ResidentAdapter, make_row
from adapters_core.mixed.rounds import rounds_of
from adapters_core.mixed.stacks import Shelf, Stack
from tests.mixed.resident import Resident, alone, only
from tests.models import make_adapter, relative_error, tiny_llama, tokens

IN, OUT = 16, 12
KINDS = [(4, False, False), (8, False, True), (16, True, False), (4, True, True)]
"""Rank, DoRA, and a bias of the adapter's own, by layout."""
KINDS_AT = {(rank, is_dora): at for at, (rank, is_dora, _) in enumerate(KINDS)}

terms = st.lists(st.sampled_from(range(len(KINDS))), max_size=3, unique=True)
batches = st.lists(terms, min_size=1, max_size=7)


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def steps_of(batch: list[list[int]]) -> tuple[list[tuple[Pass, Stack]], list[Factors]]:
    """The passes of rows with adapters by number, one of each of `KINDS`, and the adapters' factors."""
    placements, stacks, factors = {}, {}, []
    for at, (rank, is_dora, has_bias) in enumerate(KINDS):
        group = GroupLayout((Projection("p", rank, IN, OUT),), is_dora, mx.float32, has_bias=has_bias)
        shelf = Shelf(Layout({"group": group}))
        adapter = ResidentAdapter(f"sha256:{at}", "lora", rank, 1.0, ("p",), 0)
        one = Factors(
            drawn(rank, IN, seed=at),
            drawn(rank, OUT, seed=10 + at),
            1 + 0.1 * drawn(OUT, seed=20 + at) if is_dora else None,
            drawn(OUT, seed=30 + at) if has_bias else None,
        )
        placements[adapter] = Placement(
            shelf.layout, shelf.put(adapter, {"group": group.pack({"p": one})}), 1.0
        )
        stacks[shelf.layout] = shelf.stacks["group"]
        factors.append(one)
    adapters = list(placements)
    rows = [make_row([(adapters[at], 1.0) for at in row]) for row in batch]
    plan = BatchPlan(rows, placements)
    return [(one, stacks[one.layout]) for one in plan.passes], factors


@given(batches)
def test_rounds_hold_every_pass_once_in_order_and_no_row_twice(batch: list[list[int]]) -> None:
    steps, _ = steps_of(batch)
    rounds = rounds_of(list(enumerate(steps)), len(batch))
    assert [number for one in rounds for number in one.numbers] == list(range(len(steps)))
    for one in rounds:
        rows = [row for number in one.numbers for row, _, _ in steps[number][0].entries]
        assert len(set(rows)) == len(rows)
    if all(len(row) <= 1 for row in batch):
        assert len(rounds) <= 1, "layouts whose rows are disjoint go in together"


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
@given(batch=batches)
def test_products_give_each_row_its_own_terms(
    length: int, bias: bool, copies: bool, batch: list[list[int]]
) -> None:
    steps, factors = steps_of(batch)
    linear, x = nn.Linear(IN, OUT, bias=bias), drawn(len(batch), length, IN, seed=50)
    rounds = rounds_of(list(enumerate(steps)), len(batch))
    found = Products(x, steps, lambda _: rounds, len(batch), copies).output("p", linear)
    base, order = linear(x), [KINDS_AT[stack.layout.rank, stack.layout.is_dora] for _, stack in steps]
    for row, own in enumerate(batch):
        if not own:
            assert mx.array_equal(found[row].view(mx.uint32), base[row].view(mx.uint32))
            continue
        y = base[row]
        for at in sorted(own, key=order.index):
            one = factors[at]
            y = y + (x[row] @ one.a.T) @ one.b + (0 if one.bias is None else one.bias)
            if one.factor is not None:
                old = linear.bias if bias else 0
                y = one.factor * (y - old) + old
        assert relative_error(np.array(found[row]), np.array(y)) < 1e-5


class MinusZero(nn.Module):
    """A base layer whose outputs are -0.0, which any sum with 0.0 makes 0.0."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.full((*x.shape[:-1], OUT), -0.0)


def test_rows_without_an_adapter_keep_the_sign_of_zero() -> None:
    steps, _ = steps_of([[0], [], [2]])
    x = drawn(3, 1, IN, seed=1)
    x[1] = 0.0
    x[0] = 0.0
    rounds = rounds_of(list(enumerate(steps)), 3)
    found = Products(x, steps, lambda _: rounds, 3, False).output("p", MinusZero())
    assert np.signbit(np.array(found[1])).all()


def test_mixed_ranks_targets_and_kinds_give_mlx_lms_answers_while_slots_move(tmp_path: Path) -> None:
    kinds = [
        (rank, keys, kind)
        for rank in (4, 8, 16)
        for keys, kind in ((["self_attn.q_proj", "self_attn.v_proj"], "lora"), (["self_attn.q_proj"], "dora"))
    ]
    model, inputs = tiny_llama(), tokens(1, 7)
    folders = [
        make_adapter(tmp_path / str(at), model, kind=kind, keys=keys, seed=at, rank=rank)
        for at, (rank, keys, kind) in enumerate(kinds)
    ]
    expected = [alone(tiny_llama(), folder, inputs, 2)[0] for folder in folders]
    resident = Resident(model)
    there = {at: resident.add(folder) for at, folder in enumerate(folders)}

    def check() -> None:
        rows = [row for one in there.values() for row in ((), only(one))]
        found = resident.logits(mx.repeat(inputs, len(rows), axis=0), rows, 2)
        base = resident.logits(mx.repeat(inputs, len(rows), axis=0), [()] * len(rows), 2)
        assert np.array_equal(found[::2], base[::2])
        for row, at in enumerate(there):
            assert relative_error(found[2 * row + 1], expected[at]) < 1e-4

    check()
    for gone in (0, 3):
        resident.bank.remove(there.pop(gone))
        check()
    there[0] = resident.add(folders[0])
    check()

"""AdapterRows follows the KV rows, and a plan lays out every term of every row exactly once."""

from __future__ import annotations

import copy
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_core.errors import BlendError
from adapters_core.mixed.layout import Layout
from adapters_core.mixed.plan import BatchPlan, Placement
from adapters_core.mixed.residents import ResidentAdapter, make_row, row_key
from adapters_core.mixed.routing import AdapterRows, Routing


def resident(name: str, kind: str = "lora") -> ResidentAdapter:
    return ResidentAdapter(f"sha256:{name}", kind, 8, 2.0, ("layer",), 0)


def numbers(array: mx.array) -> list[Any]:
    return cast("list[Any]", array.tolist())


ADAPTERS = [resident(name) for name in "abcdef"]
LAYOUTS = [Layout({}), Layout({})]
ROUTING = Routing()
ROUTING.placements = {one: Placement(LAYOUTS[at % 2], at, 2.0) for at, one in enumerate(ADAPTERS)}
terms = st.lists(
    st.tuples(st.sampled_from(ADAPTERS), st.sampled_from([-1.0, 0.5, 1.0, 2.0])),
    max_size=3,
    unique_by=lambda term: term[0].digest,
)
rows = st.lists(terms.map(make_row), min_size=1, max_size=8)


@given(rows)
def test_a_plan_holds_every_term_once(rows) -> None:
    found = []
    for one in BatchPlan(rows, ROUTING.placements).passes:
        at = list(range(len(rows))) if one.rows is None else numbers(one.rows)
        assert len(set(at)) == len(at)
        assert all(LAYOUTS[slot % 2] is one.layout for slot in numbers(one.slots))
        found += zip(at, numbers(one.slots), numbers(one.weights(mx.float32).reshape(-1)), strict=True)
    expected = [
        (row, ADAPTERS.index(adapter), 2.0 * weight)
        for row, row_terms in enumerate(rows)
        for adapter, weight in row_terms
    ]
    assert sorted(found) == sorted(expected)


@given(rows)
def test_packed_rows_say_the_same_as_the_lists(rows) -> None:
    for one in BatchPlan(rows, ROUTING.placements).passes:
        packed = np.array(one.packed)
        at = list(range(len(rows))) if one.rows is None else numbers(one.rows)
        weights = numbers(one.weights(mx.float32).reshape(-1))
        assert packed[at, 0].tolist() == numbers(one.slots)
        assert packed[at, 1].view(np.float32).tolist() == weights
        assert set(packed[[row for row in range(len(rows)) if row not in at], 0].tolist()) <= {-1}


@given(rows)
def test_one_slot_is_named_where_all_rows_have_it(rows) -> None:
    for one in BatchPlan(rows, ROUTING.placements).passes:
        alone = one.rows is None and len(set(numbers(one.slots))) == 1
        assert one.slot == (numbers(one.slots)[0] if alone else None)


@given(rows)
def test_select_puts_the_adapted_rows_back_in_their_places(rows) -> None:
    for one in BatchPlan(rows, ROUTING.placements).passes:
        if one.rows is None:
            assert one.select is None
            continue
        assert one.select is not None
        at = numbers(one.rows)
        new = {row: len(rows) + index for index, row in enumerate(at)}
        assert numbers(one.select) == [new.get(row, row) for row in range(len(rows))]


def test_what_a_layer_lays_out_for_a_plan_is_made_once_for_each_layer() -> None:
    plan = BatchPlan([((ADAPTERS[0], 1.0),)], ROUTING.placements)
    made = []

    def make(given: BatchPlan) -> str:
        made.append(given)
        return f"work {len(made)}"

    assert [plan.work(owner, make) for owner in ("a", "b", "a")] == ["work 1", "work 2", "work 1"]
    assert made == [plan, plan]


@given(st.data())
def test_adapter_rows_move_as_a_list_of_rows_does(data) -> None:
    mine = data.draw(rows)
    entry = AdapterRows.merge([AdapterRows([row]) for row in mine])
    for _ in range(data.draw(st.integers(0, 5))):
        if data.draw(st.booleans()):
            more = data.draw(rows)
            entry.extend(AdapterRows(more))
            mine = mine + more
        else:
            keep = data.draw(st.lists(st.integers(0, len(mine) - 1), min_size=1, unique=True))
            entry.filter(mx.array(keep) if data.draw(st.booleans()) else keep)
            mine = [mine[index] for index in keep]
        assert list(entry.rows) == mine
        plan = entry.plan(ROUTING)
        assert (plan is None) == (not any(mine))
        assert plan is None or plan.batch_size == len(mine)
    for index, row in enumerate(mine):
        assert entry.extract(index).rows == (row,)


def test_a_copy_shares_the_residents_and_not_the_rows() -> None:
    entry = AdapterRows([make_row([(ADAPTERS[0], 1.0)]), ()])
    other = copy.deepcopy(entry)
    other.filter([1])
    assert entry.rows[0][0][0] is ADAPTERS[0]
    assert (len(entry.rows), len(other.rows)) == (2, 1)


def test_a_plan_is_laid_out_anew_after_slots_moved_or_rows_changed() -> None:
    routing = Routing()
    routing.placements = ROUTING.placements
    entry = AdapterRows([make_row([(ADAPTERS[0], 1.0)])])
    first = entry.plan(routing)
    assert entry.plan(routing) is first
    routing.generation += 1
    second = entry.plan(routing)
    assert second is not first
    entry.extend(AdapterRows([()]))
    assert entry.plan(routing) is not second


@given(terms, st.randoms())
def test_a_row_does_not_depend_on_the_order_of_its_terms(terms, random) -> None:
    shuffled = list(terms)
    random.shuffle(shuffled)
    assert row_key(make_row(shuffled)) == row_key(make_row(terms))


def test_weights_of_the_same_adapter_add_up_and_zero_drops_out() -> None:
    a, b = ADAPTERS[:2]
    assert make_row([(a, 0.5), (a, 0.25), (b, 0.0)]) == ((a, 0.75),)
    assert make_row([(a, 1.0), (a, -1.0)]) == ()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight) -> None:
    with pytest.raises(BlendError, match="finite"):
        make_row([(ADAPTERS[0], weight)])


def test_dora_is_alone_and_at_weight_one() -> None:
    dora = resident("dora", "dora")
    assert make_row([(dora, 1.0)]) == ((dora, 1.0),)
    with pytest.raises(BlendError, match="weight 1"):
        make_row([(dora, 0.5)])
    with pytest.raises(BlendError, match="blended"):
        make_row([(dora, 1.0), (ADAPTERS[0], 1.0)])

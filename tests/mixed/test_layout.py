"""What an adapter's rows hold, which projections share one, and the text of the kernel that reads them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_core.mixed.kernel_source import add_source
from adapters_core.mixed.layout import (
    Factors,
    GroupLayout,
    Layout,
    Projection,
    bucket_rank,
    group_projections,
)
from adapters_core.mixed.residents import ResidentAdapter
from adapters_core.mixed.stacks import Shelf

ranks = st.integers(1, 12)
sizes = st.integers(1, 9)


def drawn(
    data: st.DataObject, count: int, is_dora: bool
) -> tuple[GroupLayout, dict[str, Factors], dict[str, int]]:
    """A layout, factors that fit it, and their true ranks."""
    in_size = data.draw(sizes)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    projections, factors, true_ranks = [], {}, {}
    for path in "abc"[:count]:
        rank, out_size = data.draw(ranks), data.draw(sizes)
        projections.append(Projection(path, bucket_rank(rank), in_size, out_size))
        a, b = rng.normal(size=(rank, in_size)), rng.normal(size=(rank, out_size))
        factor = mx.array(rng.normal(size=out_size), dtype=mx.float32) if is_dora else None
        factors[path] = Factors(mx.array(a, dtype=mx.float32), mx.array(b, dtype=mx.float32), factor)
        true_ranks[path] = rank
    return GroupLayout(tuple(projections), is_dora, mx.float32), factors, true_ranks


@given(st.data(), st.integers(1, 3), st.booleans())
def test_a_stack_gives_back_what_was_packed_and_nought_beyond(data, count, is_dora) -> None:
    layout, factors, true_ranks = drawn(data, count, is_dora)
    shelf = Shelf(Layout({"group": layout}))
    filler = ResidentAdapter("sha256:filler", "lora", 4, 1.0, ("a",), 0)
    shelf.put(filler, {"group": mx.full((layout.size,), 7.0)})
    row = layout.pack(factors)
    assert row.shape == (layout.size,)
    slot = shelf.put(ResidentAdapter("sha256:one", "lora", 4, 1.0, ("a",), 0), {"group": row})
    stack = shelf.stacks["group"]
    for path, found in factors.items():
        rank = true_ranks[path]
        a, b = np.array(stack.a()[slot][layout.ranks[path]]), np.array(stack.b(path)[slot])
        assert np.array_equal(a[:rank], np.array(found.a))
        assert not a[rank:].any()
        assert np.array_equal(b[:rank], np.array(found.b))
        assert not b[rank:].any()
        if found.factor is not None:
            assert np.array_equal(np.array(stack.factor(path)[slot]), np.array(found.factor))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_slots_are_never_shared_and_memory_follows_what_is_there(puts: list[bool]) -> None:
    layout = GroupLayout((Projection("a", 4, 3, 5),), False, mx.float32)
    shelf = Shelf(Layout({"group": layout}))
    there: dict[ResidentAdapter, float] = {}
    for number, put in enumerate(puts):
        if put or not there:
            one = ResidentAdapter(f"sha256:{number}", "lora", 4, 1.0, ("a",), 0)
            shelf.put(one, {"group": mx.full((layout.size,), float(number))})
            there[one] = float(number)
        else:
            one = next(iter(there))
            shelf.drop(one)
            del there[one]
        slab = np.array(shelf.stacks["group"].slab)
        assert shelf.slots.keys() == there.keys()
        assert all((slab[shelf.slots[one]] == value).all() for one, value in there.items())
        row_bytes = layout.size * 4
        assert shelf.size_bytes <= row_bytes * (len(there) + 1 + len(there) // 16) or not there


def test_projections_that_share_an_input_form_a_group_in_a_fixed_order() -> None:
    layer = "model.layers.0."
    found = group_projections(
        {
            f"{layer}self_attn.v_proj": 64,
            f"{layer}self_attn.q_proj": 64,
            f"{layer}self_attn.o_proj": 64,
            f"{layer}mlp.up_proj": 64,
            f"{layer}mlp.gate_proj": 64,
            f"{layer}mlp.down_proj": 128,
            "model.layers.1.self_attn.q_proj": 64,
            "model.layers.1.self_attn.k_proj": 32,
            "lm_head": 64,
        }
    )
    assert sorted(found.values()) == [
        ["lm_head"],
        [f"{layer}mlp.down_proj"],
        [f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"],
        [f"{layer}self_attn.o_proj"],
        [f"{layer}self_attn.q_proj", f"{layer}self_attn.v_proj"],
        ["model.layers.1.self_attn.k_proj"],
        ["model.layers.1.self_attn.q_proj"],
    ]


@pytest.mark.parametrize("clusters", [False, True])
def test_the_kernels_name_follows_its_text_since_mlx_keeps_kernels_by_name(clusters: bool) -> None:
    text = add_source(mx.bfloat16, mx.float32, 4, 512, 256, 8, clusters)
    assert ("cluster_dims" in text.header) == ("this_cluster" in text.body) == clusters
    others = {
        add_source(*of, 256, 8, clusters).name
        for of in (
            (mx.float32, mx.float32, 4, 512),
            (mx.bfloat16, mx.bfloat16, 4, 512),
            (mx.bfloat16, mx.float32, 16, 512),
            (mx.bfloat16, mx.float32, 4, 4096),
        )
    }
    assert len(others) == 4
    assert text.name not in others

"""What the host does around the fused kernel, with a stand-in that computes what it does on any device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.mixed.cuda import Function, has_clusters
from adapters_core.mixed.kernel import Kernels, on_cuda
from adapters_core.mixed.kernel_source import add_source
from adapters_core.mixed.launches import STACK_COUNTS
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from adapters_core.mixed.with_base_source import product_source, shrink_source
from tests.mixed.architectures import tiny
from tests.mixed.resident import Resident, only
from tests.models import (
    adapter_tensors,
    adapter_values,
    make_adapter,
    relative_error,
    tiny_llama,
    tokens,
    write_adapter,
)

ALL = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


WIDEST = 48  # the most that the ranks of a group come to here


class StandIn(Kernels):
    """Plain sums of what a kernel is given, so that a CPU can run all but the kernel itself."""

    def __init__(self, compiles: bool) -> None:
        super().__init__(compiles, clusters=True)
        self.traces = self.products = 0
        self.texts: set[tuple[str, str, str]] = set()

    def add(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int, ranks: int) -> Function:
        self.texts.add(add_source(dtype, factors, stacks, ranks, 256, 8, clusters=True))

        def kernel(inputs: list[mx.array], output_shapes: list[Any], **_: Any) -> list[mx.array]:
            self.traces += 1
            x, rows, table, *rest = inputs
            slabs, ys = rest[:stacks], rest[stacks:]
            assert [slab.dtype for slab in slabs] == [factors] * stacks
            told = Told(rows, table, slabs)
            outputs = told.expanded(told.shrunk(x), ys)
            return [
                y if y.shape == tuple(shape) else mx.zeros(shape)
                for y, shape in zip(outputs, output_shapes, strict=True)
            ]

        return kernel

    def shrink(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int) -> Function:
        self.texts.add(shrink_source(dtype, factors, stacks))

        def kernel(inputs: list[mx.array], output_shapes: list[Any], **_: Any) -> list[mx.array]:
            x, rows, table, *slabs = inputs
            [(batch, rank)] = output_shapes
            assert (batch, len(slabs)) == (len(x), stacks)
            return [Told(rows, table, slabs).shrunk(x)[:, :rank]]

        return kernel

    def product(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int, rows: int, in_size: int) -> Function:
        self.texts.add(product_source(dtype, factors, stacks, rows, in_size))

        def kernel(inputs: list[mx.array], output_shapes: list[Any], **_: Any) -> list[mx.array]:
            self.products += 1
            x, h, of_rows, table, *rest = inputs
            assert (len(x), x.shape[-1]) == (rows, in_size)
            ys = [x @ weight.T for weight in rest[stacks:]]
            outputs = Told(of_rows, table, rest[:stacks]).expanded(h, ys)
            return [
                y if y.shape == tuple(shape) else mx.zeros(shape)
                for y, shape in zip(outputs, output_shapes, strict=True)
            ]

        return kernel


class Told:
    """What a launch's two arrays say, read as a kernel reads them."""

    def __init__(self, rows: mx.array, table: mx.array, slabs: list[mx.array]) -> None:
        self.stack, self.slot = rows[:, 0], rows[:, 1]
        self.weight = rows[:, 2:3].view(mx.float32)
        self.table = table
        self.flat = [slab.reshape(-1) for slab in slabs]

    def of(self, number: int) -> mx.array:
        return self.table[8 + 16 * mx.maximum(self.stack, 0) + number]

    def read(self, at: mx.array) -> mx.array:
        """The numbers at `at` (B, …) of each row's slot."""
        more = [1] * (at.ndim - 1)
        at = at + (self.slot * self.of(0)).reshape(-1, *more)
        found = mx.zeros(at.shape)
        for number, flat in enumerate(self.flat):
            mine = (self.stack == number).reshape(-1, *more)
            found = mx.where(mine, flat[mx.clip(at, 0, flat.size - 1)].astype(mx.float32), found)
        return found

    def shrunk(self, x: mx.array) -> mx.array:
        r, size = mx.arange(WIDEST)[None, :, None], x.shape[-1]
        a = self.read(mx.broadcast_to(r * size + mx.arange(size), (len(x), WIDEST, size)))
        a = mx.where(r < self.of(1)[:, None, None], a, 0)
        return (a @ x.astype(mx.float32).swapaxes(-1, -2))[..., 0] * self.weight

    def expanded(self, h: mx.array, ys: list[mx.array]) -> list[mx.array]:
        outputs = []
        for p, y in enumerate(ys):
            rank, h0, b0, f0 = (self.of(4 + 4 * p + number)[:, None] for number in range(4))
            r, size = mx.arange(WIDEST)[None], y.shape[-1]
            hp = mx.take_along_axis(h, mx.minimum(h0 + r, h.shape[1] - 1), axis=1)
            hp = mx.where(r < rank, hp, 0)
            b = self.read(b0[..., None] + r[..., None] * size + mx.arange(size))
            new = y + (hp[:, None] @ b).astype(y.dtype)
            scaled = self.read(f0 + mx.arange(size))[:, None].astype(y.dtype) * new
            new = mx.where((f0 >= 0)[..., None], scaled, new)
            outputs.append(mx.where(((self.stack[:, None] >= 0) & (rank > 0))[..., None], new, y))
        return outputs


class Served:
    """A model with adapters of four layouts, and its logits of one token for given rows."""

    def __init__(self, root: Path, model: nn.Module, size: float = 0.2) -> None:
        self.routing = Routing()
        self.bank = AdapterBank(model, self.routing)
        self.routed = RoutedModel(model, self.routing)
        recipes: list[dict[str, Any]] = [
            {"kind": "lora", "rank": 4},
            {"kind": "lora", "rank": 8, "keys": ALL, "scale": 0.7},
            {"kind": "dora", "rank": 4},
            {"kind": "dora", "rank": 8, "keys": ALL},
        ]
        self.adapters = [
            self.add(make_adapter(root / str(seed), model, seed=seed, size=size, **recipe))
            for seed, recipe in enumerate(recipes * 2)
        ]

    def add(self, folder: Path) -> ResidentAdapter:
        return self.bank.add(AdapterContainer.from_directory(folder))

    def logits(self, kernels: Kernels | None, rows: Sequence[RowAdapters], steps: int = 1) -> np.ndarray:
        self.routing.kernels = kernels
        caches = [self.routed.new_cache(row) for row in rows]
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        found = [
            self.routed(tokens(len(rows), 1, seed=step), cache=merged).astype(mx.float32)
            for step in range(steps)
        ]
        return np.array(mx.concatenate(found, axis=1))


def rows_of(adapters: Sequence[ResidentAdapter]) -> list[RowAdapters]:
    blend = make_row([(adapters[0], 0.5), (adapters[1], -0.3), (adapters[4], 0.8)])
    return [(), *(make_row([(adapter, 1.0)]) for adapter in adapters), blend, ()]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_kernel_calls_compute_what_the_products_do(compiles: bool, bits: int | None, tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama(0, bits, attention_bias=False, mlp_bias=False))
    rows = rows_of(served.adapters)
    kernels = StandIn(compiles)
    found = served.logits(kernels, rows, steps=3)
    assert kernels.traces > 0
    assert relative_error(found, served.logits(None, rows, steps=3)) < 1e-5


def test_layers_of_one_form_share_a_compiled_function(tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama(attention_bias=False, mlp_bias=False))
    kernels = StandIn(compiles=True)
    rows = [make_row([(served.adapters[1], 1.0)])] * 2
    served.logits(kernels, rows, steps=4)
    assert kernels.traces == 4, (
        "query with key and value, output, gate with up, down: of all layers and steps"
    )


def half_precision(dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A model whose sizes are whole tiles of the kernels that compute base layers as well."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_llama(attention_bias=False, mlp_bias=False, **sizes, **heads)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def shared_out(adapters: Sequence[ResidentAdapter], rows: int) -> list[RowAdapters]:
    return [make_row([(adapters[at % len(adapters)], 1.0)]) for at in range(rows)]


@pytest.mark.parametrize("rows", [1, 2, 9, 17, 32, 33])
@pytest.mark.parametrize("first", [1, 3])
def test_base_layers_are_computed_with_the_adapters_of_one_layout(
    first: int, rows: int, tmp_path: Path
) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    kernels = StandIn(compiles=True)
    mine = shared_out(served.adapters[first::4], rows)
    expected = served.logits(None, mine, steps=3)
    assert relative_error(served.logits(kernels, mine, steps=3), expected) < 0.02
    assert kernels.products == (4 if rows <= 32 else 0), "as many as groups, for all layers and steps"
    assert len({name for name, *_ in kernels.texts}) == len(kernels.texts), "MLX keeps kernels by name"
    base = served.logits(None, [()] * rows, steps=3)
    assert relative_error(base, expected) > 0.1, "no effect to be checked"


def test_what_is_blended_in_is_added_to_what_the_first_kernels_compute(tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    one, other = served.adapters[1::4]
    rows = [make_row([(one, 0.5), (other, 0.8)]), make_row([(other, 1.0)])]
    kernels = StandIn(compiles=True)
    found = served.logits(kernels, rows, steps=3)
    assert kernels.products == 4
    assert kernels.traces > 4, "the blend's second adapter has launches of its own"
    assert relative_error(found, served.logits(None, rows, steps=3)) < 0.02


MIXES: dict[str, list[dict[str, Any]]] = {
    "three ranks": [{"rank": rank, "keys": ALL} for rank in (8, 16, 12)],
    "nine layouts": [
        {"rank": rank, "keys": keys} for rank in (4, 8, 16) for keys in (ALL[:3:2], ALL[:4], ALL)
    ],
    "LoRA with DoRA": [{"rank": 8, "keys": ALL}, {"rank": 8, "keys": ALL, "kind": "dora"}],
    # With one token to attend to, queries are of no effect.
    "values with queries": [
        {"rank": 4, "keys": ALL[2:3], "kind": "dora"},
        {"rank": 8, "keys": ALL[:1]},
    ],
}


def mixed(served: Served, root: Path, mix: str) -> list[ResidentAdapter]:
    recipes = MIXES[mix]
    return [
        served.add(
            make_adapter(
                root / f"{mix} {at}",
                served.routed.model,
                **{"kind": "lora", "seed": 50 + at, "size": 0.05, "scale": 0.9} | recipe,
            )
        )
        for at, recipe in enumerate(recipes)
    ]


def groups_of(rows: Sequence[RowAdapters]) -> set[tuple[str, ...]]:
    """The kinds of groups that the rows' adapters touch."""
    names = {path.rpartition(".")[2] for row in rows for adapter, _ in row for path in adapter.paths}
    families = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    return {family for family in families if names & set(family)}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rows", [1, 10])
def test_one_launch_serves_rows_of_any_layouts(mix: str, rows: int, tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    mine = shared_out(mixed(served, tmp_path, mix), rows)
    kernels = StandIn(compiles=True)
    expected = served.logits(None, mine)
    assert relative_error(served.logits(kernels, mine), expected) < 0.02
    assert kernels.products == len(groups_of(mine)), "one for each kind of group"
    assert kernels.traces == 0
    assert relative_error(served.logits(None, [()] * rows), expected) > 0.01, "no effect to be checked"


@pytest.mark.parametrize("mix", MIXES)
def test_base_rows_between_rows_of_any_layouts_keep_their_bits(mix: str, tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    rows: list[RowAdapters] = [(), *shared_out(mixed(served, tmp_path, mix), 4), ()]
    kernels = StandIn(compiles=True)
    found, expected = served.logits(kernels, rows), served.logits(None, rows)
    assert kernels.products == 0
    assert relative_error(found, expected) < 0.02
    base = served.logits(None, [()] * len(rows))
    assert np.array_equal(found[[0, -1]], base[[0, -1]])


def test_more_stacks_than_a_launch_takes_are_served_by_several(tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama(attention_bias=False, mlp_bias=False))
    recipes: list[dict[str, Any]] = [
        {"rank": rank, "kind": kind, "keys": keys}
        for rank in (4, 8, 12, 16)
        for kind in ("lora", "dora")
        for keys in (ALL[:1], ALL[:2], ALL[:3])
    ]
    adapters = [
        served.add(make_adapter(tmp_path / f"{at}", served.routed.model, seed=at, size=0.2, **recipe))
        for at, recipe in enumerate(recipes)
    ]
    assert len(adapters) > max(STACK_COUNTS)
    rows = shared_out(adapters, len(adapters))
    found = served.logits(StandIn(compiles=False), rows, steps=2)
    assert relative_error(found, served.logits(None, rows, steps=2)) < 1e-5


def test_rows_without_an_adapter_keep_the_base_layers_own_bits(tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    rows = [make_row([(served.adapters[1], 1.0)]), (), make_row([(served.adapters[5], 1.0)])]
    kernels = StandIn(compiles=True)
    found = served.logits(kernels, rows)
    assert (kernels.products, kernels.traces) == (0, 4)
    assert np.array_equal(found[1], served.logits(None, [()] * 3)[1])


class Counting(Kernels):
    """The kernels themselves, and how often base layers were to be computed with them."""

    count = 0

    def product(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int, rows: int, in_size: int) -> Function:
        self.count += 1
        return super().product(dtype, factors, stacks, rows, in_size)


@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [1, 3, 9, 17, 33])
def test_the_kernels_themselves_compute_what_the_products_do(rows: int, tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    for first in (1, 3):
        mine = shared_out(served.adapters[first::4], rows)
        expected = served.logits(None, mine, steps=3)
        kernels = Counting()
        for each in (kernels, Kernels(with_base=False), Kernels(compiles=False)):
            assert relative_error(served.logits(each, mine, steps=3), expected) < 0.02
        assert (kernels.count > 0) == (has_clusters() and rows <= 32)


@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
def test_the_kernels_themselves_leave_what_others_compute_alone_in_long_evaluations(tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    for kernels in every_kind_of_kernel():
        for rows in (32, 8, 1):
            served.logits(kernels, shared_out(served.adapters, rows), steps=60)
            assert mx.sum(mx.ones(1000, dtype=mx.int32)).item() == 1000


@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 32])
def test_the_kernels_themselves_serve_rows_of_any_layouts(mix: str, rows: int, tmp_path: Path) -> None:
    served = Served(tmp_path, half_precision(), size=0.05)
    adapters = mixed(served, tmp_path, mix)
    for between in (False, True):
        mine = shared_out(adapters, rows)
        if between:
            mine[::3] = [()] * len(mine[::3])
        expected = served.logits(None, mine, steps=3)
        base = served.logits(None, [()] * rows, steps=3)
        for each in every_kind_of_kernel():
            found = served.logits(each, mine, steps=3)
            assert relative_error(found, expected) < 0.02
            if between:
                assert np.array_equal(found[::3], base[::3])


# By scale: of A and B, so that the scale times x A leaves float16's range where the delta is about 1.
SIZES = {1e-3: (30.0, 1.0), 1.0: (30.0, 1e-3), 20.0: (300.0, 5e-6), 2e3: (3.0, 5e-6)}


def in_halves(served: Served, root: Path, dtype: mx.Dtype, scale: float, rows: int) -> list[RowAdapters]:
    """Rows of two adapters whose factors are of half precision; x A is as large as their deltas allow."""
    adapters = []
    for seed in (1, 2):
        values = adapter_values(rank=8, keys=ALL, scale=scale)
        tensors = adapter_tensors(served.routed.model, values, seed, size=1.0)
        a, b = SIZES[scale]
        halves = {
            name: (tensor * (a if name.endswith("lora_a") else b)).astype(dtype)
            for name, tensor in tensors.items()
        }
        adapters.append(served.add(write_adapter(root / f"halves {seed}", values, halves)))
    return shared_out(adapters, rows)


HALVES = pytest.mark.parametrize(
    ("dtype", "scale"), [(dtype, scale) for dtype in (mx.float16, mx.bfloat16) for scale in SIZES]
)


@HALVES
def test_factors_of_half_precision_go_to_the_kernels_at_any_scale(
    dtype: mx.Dtype, scale: float, tmp_path: Path
) -> None:
    served = Served(tmp_path, half_precision(dtype), size=0.05)
    mine = in_halves(served, tmp_path, dtype, scale, 3)
    kernels = StandIn(compiles=True)
    found, expected = served.logits(kernels, mine, steps=2), served.logits(None, mine, steps=2)
    assert kernels.products == 4
    assert np.isfinite(found).all()
    assert relative_error(found, expected) < 0.02
    assert relative_error(served.logits(None, [()] * 3, steps=2), expected) > 0.05, "no effect to be checked"


@pytest.mark.skipif(not on_cuda(), reason="needs a CUDA GPU")
@HALVES
@pytest.mark.parametrize("rows", [1, 3, 17, 33])
def test_the_kernels_themselves_compute_factors_of_half_precision(
    rows: int, dtype: mx.Dtype, scale: float, tmp_path: Path
) -> None:
    served = Served(tmp_path, half_precision(dtype), size=0.05)
    mine = in_halves(served, tmp_path, dtype, scale, rows)
    in_float32 = Served(tmp_path / "32", half_precision(mx.float32), size=0.05)
    expected = in_float32.logits(None, in_halves(in_float32, tmp_path / "32", dtype, scale, rows), steps=2)
    bound = 0.01 if dtype == mx.float16 else 0.05
    for found in (served.logits(each, mine, steps=2) for each in every_kind_of_kernel()):
        assert np.isfinite(found).all()
        assert relative_error(found, expected) < bound


def every_kind_of_kernel() -> list[Kernels]:
    """Those that this device and MLX's settings allow."""
    return [Kernels(), Kernels(with_base=False), Kernels(compiles=False), Kernels(clusters=False)]


@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_with_several_outputs_is_one_layer_to_the_kernel(bits: int | None, tmp_path: Path) -> None:
    resident = Resident(tiny("afm7, split query, key and value", bits))
    adapters = [
        resident.add(
            make_adapter(
                tmp_path / str(seed), resident.model, keys=["self_attn.qkv_proj"], seed=seed, rank=rank
            )
        )
        for seed, rank in ((1, 4), (2, 4), (3, 6))
    ]
    rows, inputs = [(), *map(only, adapters)], tokens(4, 1)
    resident.routing.kernels = None  # a stack would keep the real ones, where there are any
    expected = resident.logits(inputs, rows, 2)
    kernels = resident.routing.kernels = StandIn(compiles=True)
    assert relative_error(resident.logits(inputs, rows, 2), expected) < 1e-5
    assert kernels.traces > 0


def test_where_the_kernel_cannot_the_products_do(tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama())
    kernels = StandIn(compiles=True)
    rows = [make_row([(served.adapters[3], 1.0)])] * 2
    with_bias = served.logits(kernels, rows)
    assert kernels.traces == 0
    assert relative_error(with_bias, served.logits(None, rows)) < 1e-6

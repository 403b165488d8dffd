"""Numbers at the ends of float16's range: wherever mlx-lm's result is finite, ours is, and it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.layers.kinds import LoRAEmbedding, LoRALinear
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import ModuleKind, weight_shape
from adapters_core.layers.targets import module_at, named_base_modules
from adapters_core.mixed.embedding import MixedEmbedding
from adapters_core.mixed.expert_products import ExpertProducts, Routes
from adapters_core.mixed.kernel import on_cuda as is_on_cuda
from adapters_core.mixed.laying_out import lay_out
from adapters_core.mixed.layout import Factors, GroupLayout, Layout, Projection
from adapters_core.mixed.linear import ProjectionGroup
from adapters_core.mixed.plan import BatchPlan, Placement
from adapters_core.mixed.products import Products
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.rounds import rounds_of
from adapters_core.mixed.routing import Routing
from adapters_core.mixed.stacks import Shelf
from tests.mixed.architectures import tiny
from tests.mixed.resident import Resident, alone, only, paths_of
from tests.models import adapter_tensors, adapter_values, relative_error, tiny_llama, tokens, write_adapter

IN, OUT, RANK = 64, 32, 4
SCALES = [(20.0, 5000.0), (2000.0, 50.0), (1e-3, 5000.0), (2e4, 3.0)]


def in_float16(name: str | None = None, bits: int | None = None) -> Any:
    model: Any = tiny_llama() if name is None else tiny(name, bits)
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model


def large(model: nn.Module, folder: Path, scale: float, size: float, **config: Any) -> Path:
    """An adapter in float16 of which x A is of about `size` where x is of about 1, and a delta of about 1."""
    values = adapter_values(rank=RANK, scale=scale, **config)
    tensors = adapter_tensors(model, values, seed=3, size=1.0)
    b = min(1.0 / (scale * size), 8.0)
    halves = {
        name: (tensor * (size / 8 if "lora_a" in name else b)).astype(mx.float16)
        if not name.endswith(".m")
        else tensor
        for name, tensor in tensors.items()
    }
    return write_adapter(folder, values, halves)


@pytest.mark.parametrize(("scale", "size"), SCALES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_large_scale_gives_mlx_lms_answers_in_float16(
    kind: str, scale: float, size: float, tmp_path: Path
) -> None:
    keys = ["mlp.down_proj", "self_attn.o_proj"]
    folder = large(in_float16(), tmp_path / "a", scale, size, kind=kind, keys=keys)
    resident = Resident(in_float16())
    row = only(resident.add(folder))
    inputs = tokens(3, 7)
    for rows in ([row] * 3, [row, (), row]):
        found = resident.logits(inputs, rows, 2)[[0, 2]]
        expected = alone(in_float16(), folder, inputs, 2)[[0, 2]]
        assert np.isfinite(expected).all()
        assert relative_error(found, expected) < 0.03
        base = alone(in_float16(), None, inputs, 2)[[0, 2]]
        assert relative_error(base, expected) > 0.1, "no effect to be checked"


@pytest.mark.parametrize(
    ("name", "bits", "kind"),
    [
        ("mixtral, tied head", 4, ModuleKind.SWITCH),
        ("qwen3, tied head", None, ModuleKind.EMBEDDING),
        ("afm7, split query, key and value", None, ModuleKind.SPLIT),
    ],
)
def test_other_kinds_of_modules_stay_in_float16s_range(
    name: str, bits: int | None, kind: ModuleKind, tmp_path: Path
) -> None:
    model = in_float16(name, bits)
    folder = large(model, tmp_path / "a", 20.0, 5000.0, keys=paths_of(model, kind)[-1:])
    resident = Resident(model)
    row, inputs = only(resident.add(folder)), tokens(2, 7)
    found = resident.logits(inputs, [row, ()], 1)
    container = AdapterContainer.from_directory(folder)
    resident.bank.close()
    container.load(into=model)
    expected = alone(model, None, inputs, 1)
    assert np.isfinite(found).all()
    assert np.isfinite(expected).all()
    assert relative_error(found[0], expected[0]) < 0.05
    assert relative_error(found[1], expected[1]) > 0.1, "no effect to be checked"


# The forms that a GPU computes float16 in; a CPU has float32 in their place.


def in_stacks(
    layout: GroupLayout, factors: Sequence[Factors], batch: Sequence[tuple[int, float] | None]
) -> tuple[BatchPlan, Shelf]:
    """A plan for rows of (adapter, scale), or None, and where the adapters' `factors` lie."""
    shelf, (path,) = Shelf(Layout({"group": layout})), layout.ranks
    rows: list[RowAdapters] = []
    adapters = [ResidentAdapter(f"sha256:{at}", "lora", RANK, 1.0, (path,), 0) for at in range(len(factors))]
    for adapter, each in zip(adapters, factors, strict=True):
        shelf.put(adapter, {"group": layout.pack({path: each})})
    placements = {one: Placement(shelf.layout, slot, 1.0) for one, slot in shelf.slots.items()}
    for term in batch:
        rows.append(() if term is None else make_row([(adapters[term[0]], term[1])]))
    return BatchPlan(rows, placements), shelf


def drawn(shape: tuple[int, ...], size: float, seed: int) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * size).astype(mx.float16)


def error_of(found: mx.array, expected: mx.array) -> float:
    """In float32, in which the squares have room."""
    return relative_error(*(np.array(array.astype(mx.float32)) for array in (found, expected)))


FORMS = [True] if is_on_cuda() else [False, True]
"""Whether as on CUDA, where MLX's gather_mm cannot read matrices in a stack."""
BATCHES: list[list[tuple[int, float] | None]] = [
    [(0, 20.0)] * 3,
    [(0, 20.0), (1, 20.0), None],
    [(0, 20.0), (1, 0.01), (0, 2000.0)],
]


@pytest.mark.parametrize("on_cuda", FORMS)
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("batch", BATCHES)
def test_products_of_float16_factors_weigh_last(
    batch: list[tuple[int, float] | None], length: int, on_cuda: bool
) -> None:
    layout = GroupLayout((Projection("p", RANK, IN, OUT),), False, mx.float16, has_bias=True)
    biases = [drawn((OUT,), 1.0, at) for at in (0, 1)]
    factors = [
        Factors(drawn((RANK, IN), 600.0, at), drawn((RANK, OUT), 1e-3, 9 + at), None, biases[at])
        for at in (0, 1)
    ]
    plan, shelf = in_stacks(layout, factors, batch)
    x, linear = drawn((3, length, IN), 1.0, 5), nn.Linear(IN, OUT, bias=False)
    linear.set_dtype(mx.float16)
    steps = [(one, shelf.stacks["group"]) for one in plan.passes]
    rounds = rounds_of(list(enumerate(steps)), 3)
    found = Products(x, steps, lambda _: rounds, 3, on_cuda).output("p", linear)
    for row, term in enumerate(batch):
        expected = linear(x[row])
        if term is not None:
            at, scale = term
            z = (x[row] @ factors[at].a.T) @ factors[at].b + biases[at]
            expected = expected + (scale * z).astype(mx.float16)
        assert mx.all(mx.isfinite(expected)).item()
        assert error_of(found[row], expected) < 5e-3


@pytest.mark.parametrize("most_gathered_bytes", [0, 1 << 20])
@pytest.mark.parametrize("on_cuda", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_experts_products_of_float16_factors_weigh_last(
    batch: list[tuple[int, float] | None], on_cuda: bool, most_gathered_bytes: int
) -> None:
    layout = GroupLayout((Projection("p", RANK, IN, OUT),), False, mx.float16, experts=2)
    factors = [Factors(drawn((2, RANK, IN), 600.0, at), drawn((2, RANK, OUT), 1e-3, 9 + at)) for at in (0, 1)]
    plan, shelf = in_stacks(layout, factors, batch)
    rows, experts = mx.array([0, 1, 2, 0, 1, 2]), mx.array([0, 0, 0, 1, 1, 1])
    x, y = drawn((6, 1, IN), 1.0, 5), drawn((6, 1, OUT), 1.0, 6)
    steps = [(one, shelf.stacks["group"]) for one in plan.passes]
    routes = Routes(rows, experts, rows)
    found = ExpertProducts(x, routes, steps, False, on_cuda, most_gathered_bytes).added("p", y)
    for pair in range(6):
        expected, term = y[pair], batch[pair % 3]
        if term is not None:
            a, b = factors[term[0]].a[pair // 3], factors[term[0]].b[pair // 3]
            expected = expected + (term[1] * ((x[pair] @ a.T) @ b)).astype(mx.float16)
        assert error_of(found[pair], expected) < 5e-3


@pytest.mark.parametrize("batch", BATCHES)
def test_an_embeddings_products_of_float16_factors_weigh_last(batch: list[tuple[int, float] | None]) -> None:
    layout = GroupLayout((Projection("p", RANK, OUT, 96),), False, mx.float16)
    # As a look-up has it, B is the first factor.
    factors = [Factors(drawn((RANK, OUT), 1e-3, at), drawn((RANK, 96), 5000.0, 9 + at)) for at in (0, 1)]
    plan, shelf = in_stacks(layout, factors, batch)
    routing, embedding = Routing(), nn.Embedding(96, OUT)
    embedding.set_dtype(mx.float16)
    group = ProjectionGroup(routing)
    group.stacks[shelf.layout] = shelf.stacks["group"]
    ids = tokens(3, 5)
    routing.plan = plan
    found = MixedEmbedding("p", embedding, group)(ids)
    for row, term in enumerate(batch):
        expected = embedding(ids[row])
        if term is not None:
            z = factors[term[0]].b.T[ids[row]] @ factors[term[0]].a
            expected = expected + (term[1] * z).astype(mx.float16)
        assert error_of(found[row], expected) < 5e-3


# Each module its own scale.


def patterned(scales: Sequence[float], dtype: mx.Dtype) -> tuple[nn.Module, dict[str, ModuleWeights]]:
    model = tiny_llama(attention_bias=False, mlp_bias=False)
    model.set_dtype(dtype)
    paths = [f"model.layers.1.{key}" for key in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    weights = {}
    for seed, (path, scale) in enumerate(zip(paths, scales, strict=True)):
        out_size, in_size = weight_shape(module_at(model, path))
        b = mx.random.normal((RANK, out_size), key=mx.random.key(seed)) * min(0.2 / scale, 0.2)
        a = mx.random.normal((in_size, RANK), key=mx.random.key(9 + seed)) * (0.2 if scale > 1 else 60.0)
        weights[path] = ModuleWeights(a.astype(dtype), b.astype(dtype), None, scale)
    return model, weights


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("scales", [(1000.0, 0.01, 2.0), (2000.0, 1e-3, 1e-3), (16.0, 4.0, 24.0)])
def test_each_module_has_its_own_scale(scales: Sequence[float], dtype: mx.Dtype) -> None:
    model, weights = patterned(scales, dtype)
    container = AdapterContainer.from_weights(weights, "test")
    resident = Resident(model)
    row, inputs = only(resident.bank.add(container)), tokens(2, 7)
    found = resident.logits(inputs, [row, ()])
    resident.bank.close()
    container.load(into=model)
    expected = np.array(model(inputs).astype(mx.float32))
    assert np.isfinite(found).all()
    assert relative_error(found[0], expected[0]) < (3e-3 if dtype == mx.float16 else 3e-2)
    assert relative_error(found[1], expected[1]) > 0.05, "no effect to be checked"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=3, max_size=3), st.sampled_from([mx.bfloat16, mx.float16]))
def test_rows_hold_the_very_deltas_whatever_the_scales(scales: list[float], dtype: mx.Dtype) -> None:
    model, weights = patterned(scales, dtype)
    modules = dict(named_base_modules(model))
    laid_out = lay_out(weights, {path: modules[path] for path in weights}, dtype)
    assert laid_out.problems == []
    for name, layout in laid_out.groups.items():
        row = laid_out.rows[name]
        a = row[layout.a].reshape(layout.rank, layout.in_size)
        for path, ranks in layout.ranks.items():
            b = row[layout.b[path]].reshape(-1, weight_shape(modules[path])[0])
            delta = laid_out.scale * (b.T.astype(mx.float32) @ a[ranks].astype(mx.float32))
            one = weights[path]
            exact = one.scale * (one.lora_b.T.astype(mx.float32) @ one.lora_a.T.astype(mx.float32))
            assert relative_error(np.array(delta), np.array(exact)) < 1e-6


def test_a_factor_in_float32_beside_one_in_float16_keeps_its_range() -> None:
    model, weights = patterned((2.0, 2.0, 2.0), mx.float16)
    path = "model.layers.1.self_attn.q_proj"
    one = weights[path]
    tiny_a, huge_b = (one.lora_a * 1e-3).astype(mx.float16), one.lora_b.astype(mx.float32) * 1e7
    weights[path] = ModuleWeights(tiny_a, huge_b, None, 2e-4)
    modules = dict(named_base_modules(model))
    laid_out = lay_out(weights, {path: modules[path] for path in weights}, mx.float16)
    assert laid_out.problems == []
    assert all(mx.all(mx.isfinite(row)).item() for row in laid_out.rows.values())


def test_a_scale_that_leaves_float32_is_refused_by_the_module() -> None:
    model, weights = patterned((2.0, 2.0, 2.0), mx.float32)
    path = "model.layers.1.self_attn.q_proj"
    one = weights[path]
    weights[path] = ModuleWeights(one.lora_a, one.lora_b * 1e35, None, 1e6)
    resident = Resident(model)
    with pytest.raises(InvalidAdapterError, match=r"q_proj: expected finite numbers.* scale 1e\+06") as found:
        resident.bank.add(AdapterContainer.from_weights(weights, "test"))
    assert len(found.value.problems) == 1
    assert resident.bank.residents == frozenset()


@pytest.mark.parametrize(("magnitude", "fits"), [(1e3, True), (1e6, False)])
def test_a_doras_factor_that_leaves_float16_is_refused(magnitude: float, fits: bool) -> None:
    model, weights = patterned((2.0, 2.0, 2.0), mx.float16)
    path = "model.layers.1.self_attn.q_proj"
    (out_size, _), one = weight_shape(module_at(model, path)), weights[path]
    dora = ModuleWeights(one.lora_a, one.lora_b, mx.full((out_size,), magnitude), one.scale)
    laid_out = lay_out({path: dora}, {path: module_at(model, path)}, mx.float16)
    assert len(laid_out.problems) == (0 if fits else 1)


def test_a_doras_norms_are_taken_in_float32() -> None:
    model, weights = patterned((2.0, 2.0, 2.0), mx.float16)
    path = "model.layers.1.self_attn.q_proj"
    (out_size, _), one = weight_shape(module_at(model, path)), weights[path]
    # s·B A of about 1e6 is nothing that float16 holds.
    large = ModuleWeights(one.lora_a * 50, one.lora_b * 50, mx.full((out_size,), 1e5), 2e3)
    laid_out = lay_out({path: large}, {path: module_at(model, path)}, mx.float16)
    ((name, layout),) = laid_out.groups.items()
    factor = np.array(laid_out.rows[name][layout.factors[path]].astype(mx.float32))
    delta = np.array(large.lora_b.T.astype(mx.float32) @ large.lora_a.T.astype(mx.float32)) * 2e3
    assert np.abs(delta).max() > 65504
    assert laid_out.problems == []
    norms = np.linalg.norm(np.array(module_at(model, path)["weight"].astype(mx.float32)) + delta, axis=1)
    assert relative_error(factor, 1e5 / norms) < 1e-3


def test_a_layer_with_one_adapter_scales_last() -> None:
    a, b = drawn((IN, RANK), 600.0, 1), drawn((RANK, OUT), 1e-3, 2)
    linear = nn.Linear(IN, OUT, bias=False)
    linear.set_dtype(mx.float16)
    found = LoRALinear(linear, ModuleWeights(a, b, None, 20.0), 0.0)(drawn((3, IN), 1.0, 3))
    embedding = nn.Embedding(IN, OUT)
    embedding.set_dtype(mx.float16)
    looked_up = LoRAEmbedding(embedding, ModuleWeights(a, b, None, 20.0), 0.0)(mx.arange(IN))
    assert mx.all(mx.isfinite(found)).item()
    assert mx.all(mx.isfinite(looked_up)).item()

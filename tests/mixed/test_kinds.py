"""Embeddings, tied heads, experts and biases in mixed rows: what comes and goes, sums, and is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import seed_oss
from mlx_lm.models.switch_layers import SwitchLinear

from adapters_core.container import AdapterContainer
from adapters_core.errors import UnsupportedModelError
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import ModuleKind, weight_shape
from adapters_core.layers.targets import module_at, named_base_modules
from adapters_core.mixed.expert_products import ExpertProducts, Routes
from adapters_core.mixed.experts import MixedExperts
from adapters_core.mixed.layout import GroupLayout, Layout, Projection
from adapters_core.mixed.plan import BatchPlan, Placement
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.stacks import Shelf
from tests.mixed.architectures import tiny
from tests.mixed.resident import Resident, alone, only, paths_of
from tests.models import (
    VOCABULARY,
    adapter_tensors,
    adapter_values,
    make_adapter,
    relative_error,
    snapshot,
    tokens,
    write_adapter,
)

PROMPT, STEPS = 12, 3


@pytest.mark.parametrize("name", ["mixtral, tied head", "nemotron_h, recurrent, SwitchMLP"])
def test_adapters_of_some_experts_come_and_go(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before, inputs = snapshot(model), tokens(1, PROMPT)
    switch = paths_of(model, ModuleKind.SWITCH)
    folders = [make_adapter(tmp_path / path, model, keys=[path], seed=3) for path in switch]
    expected = [alone(tiny(name), folder, inputs)[0] for folder in folders]
    resident = Resident(model)

    def check(there: dict[int, ResidentAdapter]) -> None:
        found = resident.logits(mx.repeat(inputs, len(there), axis=0), [only(one) for one in there.values()])
        for row, which in enumerate(there):
            assert relative_error(found[row], expected[which]) < 1e-4

    there = {0: resident.add(folders[0])}
    check(there)
    for which in range(1, len(folders)):
        there[which] = resident.add(folders[which])
        check(there)
    resident.bank.remove(there.pop(0))
    check(there)
    there[0] = resident.add(folders[0])
    check(there)
    for one in there.values():
        resident.bank.remove(one)
    assert resident.bank.resident_bytes == 0
    assert snapshot(model) == before


def test_weights_and_blends_of_embeddings_and_experts_are_sums_of_the_deltas(tmp_path: Path) -> None:
    model = tiny("mixtral, tied head")
    keys = [*paths_of(model, ModuleKind.SWITCH), *paths_of(model, ModuleKind.EMBEDDING)]
    folders = [
        make_adapter(tmp_path / str(seed), model, keys=keys, seed=seed, rank=rank, size=0.1)
        for seed, rank in ((1, 4), (2, 4), (3, 8))
    ]
    shares = (0.7, -0.4, 1.5)
    resident = Resident(model)
    adapters = [resident.add(folder) for folder in folders]
    row, inputs = make_row(zip(adapters, shares, strict=True)), tokens(3, PROMPT)
    dense = tiny("mixtral, tied head")
    modules: dict[str, Any] = dict(named_base_modules(dense))
    for folder, share in zip(folders, shares, strict=True):
        for path, part in AdapterContainer.from_directory(folder).check(dense).items():
            product = part.lora_b @ part.lora_a if part.lora_a.ndim == 3 else part.lora_a @ part.lora_b
            modules[path].weight = modules[path].weight + share * part.scale * product
    expected = alone(dense, None, inputs, STEPS)
    assert relative_error(resident.logits(inputs, [row] * 3, STEPS), expected) < 1e-4
    mixed = resident.logits(inputs, [row, (), row], STEPS)
    assert relative_error(mixed[[0, 2]], expected[[0, 2]]) < 1e-4
    base = alone(tiny("mixtral, tied head"), None, inputs, STEPS)
    assert np.array_equal(mixed[1], resident.logits(inputs, [(), (), ()], STEPS)[1])
    assert relative_error(mixed[1], base[1]) < 1e-6


def test_a_bias_of_the_adapters_own_is_weighted_with_its_update() -> None:
    model = tiny("llama, dense")
    paths = [f"model.layers.1.{key}" for key in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    containers = []
    for seed in (1, 2):
        weights = {}
        for at, path in enumerate(paths):
            rows, columns = weight_shape(module_at(model, path))
            keys = mx.random.split(mx.random.key(10 * seed + at), 3)
            a, b, bias = (
                0.2 * mx.random.normal(shape, key=key)
                for shape, key in zip([(columns, 4), (4, rows), (rows,)], keys, strict=True)
            )
            # One module of the group without a bias, beside one that has it.
            weights[path] = ModuleWeights(a, b, None, 0.5 * seed, bias if at != 1 else None)
        containers.append(AdapterContainer.from_weights(weights, f"adapter {seed}"))
    resident = Resident(model)
    adapters = [resident.bank.add(container) for container in containers]
    inputs = tokens(4, PROMPT)
    mixed = resident.logits(inputs, [*map(only, adapters), (), make_row([(adapters[0], -0.5)])], STEPS)
    for row, share in ((0, 1.0), (1, 1.0), (3, -0.5)):
        container = containers[row % 3]
        dense = tiny("llama, dense")
        for path, part in container.check(dense).items():
            linear: Any = module_at(dense, path)
            linear.weight = linear.weight + share * part.scale * (part.lora_a @ part.lora_b).T
            if part.bias is not None:
                linear.bias = share * part.scale * part.bias
        expected = alone(dense, None, inputs[row : row + 1], STEPS)[0]
        assert relative_error(mixed[row], expected) < 1e-4
    assert relative_error(mixed[2], alone(tiny("llama, dense"), None, inputs[2:3], STEPS)[0]) < 1e-6


def test_half_precision_factors_of_embeddings_and_experts(tmp_path: Path) -> None:
    # On a CPU, MLX has products of chosen matrices in float32 alone; a quantised base computes in others too.
    one = tiny("mixtral, tied head", 4)
    one.set_dtype(mx.bfloat16)
    keys = [*paths_of(one, ModuleKind.SWITCH), *paths_of(one, ModuleKind.EMBEDDING)]
    values = adapter_values(keys=keys)
    halves = {name: t.astype(mx.bfloat16) for name, t in adapter_tensors(one, values, size=0.1).items()}
    folder = write_adapter(tmp_path / "a", values, halves)
    inputs = tokens(3, PROMPT)
    container = AdapterContainer.from_directory(folder)
    container.load(into=one)
    expected = alone(one, None, inputs, STEPS)
    container.unload(from_=one)
    resident = Resident(one)
    row = only(resident.add(folder))
    assert relative_error(resident.logits(inputs, [row, (), row], STEPS)[[0, 2]], expected[[0, 2]]) < 3e-2


def test_the_forms_for_cuda_compute_the_same(tmp_path: Path) -> None:
    name = "mixtral, tied head"
    resident = Resident(tiny(name))
    keys = [*paths_of(resident.model, ModuleKind.SWITCH), *paths_of(resident.model, ModuleKind.EMBEDDING)]
    folders = [
        make_adapter(tmp_path / str(seed), resident.model, keys=keys, seed=seed, size=0.1) for seed in (1, 2)
    ]
    rows = [*(only(resident.add(folder)) for folder in folders), ()]
    resident.routing.on_cuda, resident.routing.kernels = True, None
    inputs = tokens(3, PROMPT)
    found = resident.logits(inputs, rows, STEPS)
    for row, folder in enumerate([*folders, None]):
        expected = alone(tiny(name), folder, inputs[row : row + 1], STEPS)[0]
        assert relative_error(found[row], expected) < 1e-4


@pytest.mark.parametrize("sorted_indices", [False, True])
def test_many_pairs_are_computed_slot_by_slot_and_are_the_same(sorted_indices: bool) -> None:
    projections = (Projection("up", 4, 16, 8), Projection("gate", 8, 16, 12))
    layout = GroupLayout(projections, False, mx.float32, experts=3)
    shelf = Shelf(Layout({"group": layout}))
    adapters = [ResidentAdapter(f"sha256:{n}", "lora", 8, 1.0, ("up", "gate"), 0) for n in range(3)]
    for seed, adapter in enumerate(adapters):
        shelf.put(adapter, {"group": mx.random.normal((layout.size,), key=mx.random.key(seed))})
    placements = {one: Placement(shelf.layout, slot, 0.5) for one, slot in shelf.slots.items()}
    batch: list[RowAdapters] = [only(adapters[0]), (), make_row([(adapters[2], -0.3)]), only(adapters[1])]
    pairs = [(0, 0), (0, 1), (0, 3), (1, 2), (1, 1), (2, 3), (2, 0)]
    experts, rows = mx.array([expert for expert, _ in pairs]), mx.array([row for _, row in pairs])
    x = mx.random.normal((7, 1, 16), key=mx.random.key(9))
    steps = [(one, shelf.stacks["group"]) for one in BatchPlan(batch, placements).passes]
    for path, out_size in (("up", 8), ("gate", 12)):
        y = mx.random.normal((7, 1, out_size), key=mx.random.key(8))
        found = [
            ExpertProducts(x, Routes(rows, experts, rows), steps, sorted_indices, on_cuda, most).added(
                path, y
            )
            for on_cuda, most in ((False, 0), (True, 1 << 20), (True, 0))
        ]
        expected = mx.array(y)
        for pair, (expert, row) in enumerate(pairs):
            for adapter, weight in batch[row]:
                stack, slot = shelf.stacks["group"], shelf.slots[adapter]
                a = stack.a(slot)[expert][layout.ranks[path]]
                expected[pair] += 0.5 * weight * (x[pair] @ a.T) @ stack.b(path, slot)[expert]
        for one in found:
            assert relative_error(np.array(one), np.array(expected)) < 1e-5
            assert mx.array_equal(one[1], y[1]).item(), "a row without an adapter"


def test_a_model_that_reads_its_embeddings_weight_is_refused_before_any_request(tmp_path: Path) -> None:
    arguments = seed_oss.ModelArgs(
        model_type="seed_oss",
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model = seed_oss.Model(arguments)
    mx.eval(model.parameters())
    before = snapshot(model)
    resident = Resident(model)
    folder = make_adapter(tmp_path / "a", model, keys=["model.embed_tokens", "self_attn.q_proj"])
    with pytest.raises(UnsupportedModelError, match="reads the weight of its Embedding itself"):
        resident.add(folder)
    assert snapshot(model) == before
    other = only(resident.add(make_adapter(tmp_path / "b", model, keys=["self_attn.q_proj"])))
    assert resident.logits(tokens(1, PROMPT), [other]).shape == (1, PROMPT, VOCABULARY)
    resident.bank.close()
    assert snapshot(model) == before


class _Own(nn.Module):
    """Experts in a module of a model's own, which could do anything with the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = SwitchLinear(64, 32, 4, bias=False)


def test_what_cannot_be_told_apart_by_row_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral, tied head")
    keys = [*paths_of(model, ModuleKind.SWITCH)[1:], *paths_of(model, ModuleKind.EMBEDDING)]
    model.layers[0].own = _Own()
    folder = make_adapter(tmp_path / "own", model, keys=["own.up_proj", "self_attn.q_proj"])
    before = snapshot(model)
    resident = Resident(model)
    with pytest.raises(UnsupportedModelError, match=r"own\.up_proj lies in a _Own"):
        resident.add(folder)
    assert snapshot(model) == before

    row = only(resident.add(make_adapter(tmp_path / "a", model, keys=keys)))
    cache = [resident.routed.new_cache(row) for _ in range(2)]
    resident.routing.plan = type(cache[0][-1]).merge([one[-1] for one in cache]).plan(resident.routing)
    experts = next(module for module in model.modules() if isinstance(module, MixedExperts))
    indices = mx.zeros((1, 6, 2), dtype=mx.uint32)
    for x, chosen in (
        (mx.zeros((1, 6, 64)), indices),
        (mx.zeros((6, 64)), indices[0]),
        (mx.zeros((2, 3, 64)), indices),
    ):
        with pytest.raises(UnsupportedModelError, match="the 2 rows of the batch"):
            experts(x, chosen)
    for ids in (mx.zeros((6,), dtype=mx.int32), mx.zeros((1, 6), dtype=mx.int32)):
        with pytest.raises(UnsupportedModelError, match="the rows of the batch"):
            model.model.embed_tokens(ids)
    with pytest.raises(UnsupportedModelError, match="reads the weight"):
        _ = model.model.embed_tokens.weight

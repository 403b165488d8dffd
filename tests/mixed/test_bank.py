"""Rows with different adapters in one forward compute what mlx-lm computes for each adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx_lm.tuner.utils import load_adapters

from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError, UnsupportedModelError
from adapters_core.mixed.layout import bucket_rank
from adapters_core.mixed.linear import MixedLinear
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from tests.mixed.resident import Resident, alone, only
from tests.models import (
    adapter_tensors,
    adapter_values,
    logits,
    make_adapter,
    relative_error,
    snapshot,
    tiny_llama,
    tokens,
    write_adapter,
)

ALL = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
RECIPES: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 4},
    {"kind": "lora", "rank": 6, "keys": ALL, "scale": 0.7},
    {"kind": "lora", "rank": 16, "keys": None, "num_layers": 2},
    {"kind": "dora", "rank": 3},
    {"kind": "dora", "rank": 8, "keys": ALL, "num_layers": 1},
    {"kind": "lora", "rank": 8, "keys": ["self_attn.o_proj", "lm_head"]},
]


@pytest.mark.parametrize("length", [9, 1])
@pytest.mark.parametrize(
    ("bits", "group_size", "bias"), [(None, 32, True), (None, 32, False), (4, 32, True), (8, 64, False)]
)
def test_mixed_rows_equal_mlx_lm_one_at_a_time(
    bits: int | None, group_size: int, bias: bool, length: int, tmp_path: Path
) -> None:
    def model() -> nn.Module:
        return tiny_llama(0, bits, group_size=group_size, attention_bias=bias, mlp_bias=bias)

    folders = [
        make_adapter(tmp_path / str(seed), model(), seed=seed, **recipe)
        for seed, recipe in enumerate(RECIPES)
    ]
    resident = Resident(model())
    rows: list[RowAdapters] = [(), *(only(resident.add(folder)) for folder in folders), ()]
    inputs = tokens(len(rows), length)
    mixed = resident.logits(inputs, rows)
    base = np.array(model()(inputs))
    for row, folder in enumerate([None, *folders, None]):
        if folder is None:
            assert relative_error(mixed[row], base[row]) < 1e-6
            continue
        reference = load_adapters(model(), str(folder))
        reference.eval()
        expected = np.array(reference(inputs[row : row + 1]))[0]
        assert relative_error(mixed[row], expected) < 1e-4
        assert relative_error(mixed[row], base[row]) > 1e-2, "the adapter has no effect to be checked"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_half_precision_base_keeps_its_dtype_beside_float32_factors(
    dtype: mx.Dtype, tmp_path: Path
) -> None:
    def model() -> nn.Module:
        made = tiny_llama()
        made.set_dtype(dtype)
        return made

    folder = make_adapter(tmp_path / "a", model(), rank=4)
    resident = Resident(model())
    row = only(resident.add(folder))
    inputs = tokens(2, 9)
    caches = [
        entries[0].merge(list(entries)) for entries in zip(*[resident.routed.new_cache(row)] * 2, strict=True)
    ]
    assert resident.routed(inputs, cache=caches).dtype == dtype
    reference = load_adapters(model(), str(folder))
    expected = np.array(reference(inputs).astype(mx.float32))
    assert relative_error(resident.logits(inputs, [row, row]), expected) < 2e-2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_factors_serve_rows_that_differ(dtype: mx.Dtype, tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = tiny_llama()
        made.set_dtype(dtype)
        return made

    resident = Resident(model())
    folders = []
    for seed in range(2):
        values = adapter_values()
        halves = {name: one.astype(dtype) for name, one in adapter_tensors(model(), values, seed).items()}
        folders.append(write_adapter(tmp_path / str(seed), values, halves))
    rows = [(), *(only(resident.add(folder)) for folder in folders)]
    for length in (9, 1):
        inputs = tokens(3, length)
        found = resident.logits(inputs, rows)
        for row, folder in enumerate(folders, start=1):
            expected = load_adapters(model(), str(folder))(inputs[row : row + 1]).astype(mx.float32)
            assert relative_error(found[row], np.array(expected)[0]) < 2e-2


def test_weights_and_blends_are_sums_of_the_deltas(tmp_path: Path) -> None:
    resident = Resident(tiny_llama())
    folders = [
        make_adapter(tmp_path / str(seed), tiny_llama(), seed=seed, rank=rank)
        for seed, rank in ((1, 4), (2, 4), (3, 8))
    ]
    a, b, c = (resident.add(folder) for folder in folders)
    blend = resident.logits(tokens(1, 9), [make_row([(a, 0.7), (b, -0.4), (c, 1.5)])])
    containers = [AdapterContainer.from_directory(folder) for folder in folders]
    dense = tiny_llama()
    changes = {}
    for container, weight in zip(containers, (0.7, -0.4, 1.5), strict=True):
        for path, part in container.check(dense).items():
            changes[path] = changes.get(path, 0) + weight * part.scale * (part.lora_a @ part.lora_b).T
    modules = dict(dense.named_modules())
    for path, delta in changes.items():
        modules[path].weight = modules[path].weight + delta
    assert relative_error(blend, np.array(dense(tokens(1, 9)))) < 1e-4


def test_base_rows_are_bit_exact_while_adapters_are_resident(tmp_path: Path) -> None:
    model = tiny_llama()
    before = logits(model)
    resident = Resident(model)
    resident.add(make_adapter(tmp_path / "a", tiny_llama(), rank=4))
    assert np.array_equal(resident.logits(tokens(2, 9), [(), ()]), before)


@pytest.mark.parametrize("length", [9, 1])
def test_rows_that_all_have_one_adapter_equal_mlx_lm(length: int, tmp_path: Path) -> None:
    inputs = tokens(3, length)
    for seed, recipe in enumerate(RECIPES):
        folder = make_adapter(tmp_path / str(seed), tiny_llama(), seed=seed, **recipe)
        resident = Resident(tiny_llama())
        others = [resident.add(folder) for _ in range(2)]
        row = only(resident.add(folder))
        reference = load_adapters(tiny_llama(), str(folder))
        reference.eval()
        assert relative_error(resident.logits(inputs, [row] * 3), np.array(reference(inputs))) < 1e-4
        if row[0][0].type == "lora":
            weighted = [make_row([(others[0], 0.5), (others[1], 0.5)])] * 3
            assert relative_error(resident.logits(inputs, weighted), np.array(reference(inputs))) < 1e-4


def test_projections_with_inputs_of_their_own_are_not_mixed_up(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=4)
    resident = Resident(model)
    row = only(resident.add(folder))
    resident.routing.plan = resident.routed.new_cache(row)[-1].plan(resident.routing)
    attention = model.layers[0].self_attn
    reference = cast("Any", load_adapters(tiny_llama(), str(folder))).layers[0].self_attn
    first, second = (mx.random.normal((1, 5, 64)) for _ in range(2))
    for x in (first, second, first):
        for name in ("q_proj", "k_proj"):
            found, expected = (np.array(getattr(at, name)(x)) for at in (attention, reference))
            assert relative_error(found, expected) < 1e-4


def test_a_row_whose_adapter_has_left_is_refused(tmp_path: Path) -> None:
    resident = Resident(tiny_llama())
    adapter = resident.add(make_adapter(tmp_path / "a", tiny_llama(), rank=4))
    resident.bank.remove(adapter)
    with pytest.raises(ContainerStateError, match="not resident"):
        resident.logits(tokens(1, 3), [only(adapter)])


def test_a_slot_is_reused_and_running_rows_keep_their_plan(tmp_path: Path) -> None:
    resident = Resident(tiny_llama())
    folders = [make_adapter(tmp_path / str(seed), tiny_llama(), seed=seed) for seed in range(5)]
    first, *others = [resident.add(folder) for folder in folders[:4]]
    entry = resident.routed.new_cache(only(first))[-1]
    plan = entry.plan(resident.routing)
    taken = resident.bank.resident_bytes
    resident.bank.remove(others[1])
    new = resident.add(folders[4])
    assert resident.bank.resident_bytes == taken
    assert entry.plan(resident.routing) is plan
    reference = load_adapters(tiny_llama(), str(folders[4]))
    expected = np.array(reference(tokens(1, 9)))
    assert relative_error(resident.logits(tokens(1, 9), [only(new)]), expected) < 1e-4


def test_memory_is_the_adapters_own_and_comes_back(tmp_path: Path) -> None:
    resident = Resident(tiny_llama())
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=8, keys=ALL)
    container = AdapterContainer.from_directory(folder)
    added = [resident.bank.add(container) for _ in range(24)]
    assert all(one.size_bytes == container.size_bytes for one in added)
    assert resident.bank.resident_bytes <= 1.1 * 24 * container.size_bytes
    freed = sum(resident.bank.remove(one) for one in added[::2])
    assert freed >= 0.8 * 12 * container.size_bytes
    row = only(added[1])
    assert (
        relative_error(
            resident.logits(tokens(1, 9), [row]),
            np.array(load_adapters(tiny_llama(), str(folder))(tokens(1, 9))),
        )
        < 1e-4
    )
    resident.bank.close()
    assert resident.bank.resident_bytes == 0


def test_ranks_are_padded_by_a_quarter_at_most() -> None:
    assert [bucket_rank(rank) for rank in (1, 4, 5, 8, 9, 16, 17, 33, 64, 65)] == [
        4, 4, 8, 8, 12, 16, 20, 40, 64, 80,
    ]  # fmt: skip
    assert all(rank <= bucket_rank(rank) <= rank + max(3, rank // 4) for rank in range(1, 300))


def test_input_whose_first_axis_is_not_the_rows_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    resident = Resident(model)
    row = only(resident.add(make_adapter(tmp_path / "a", tiny_llama(), rank=4)))
    with pytest.raises(TypeError, match=r"2 row\(s\)"):
        resident.routed(tokens(2, 3), cache=resident.routed.new_cache(row))
    layer = next(module for module in model.modules() if isinstance(module, MixedLinear))
    routing = resident.routing
    routing.plan = resident.routed.new_cache(row)[-1].plan(routing)
    with pytest.raises(UnsupportedModelError, match="axis 0"):
        layer(mx.zeros((3, 64)))


def test_calls_out_of_turn_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    before = snapshot(model)
    resident = Resident(model)
    prepared = resident.bank.prepare(
        AdapterContainer.from_directory(make_adapter(tmp_path / "a", tiny_llama(), rank=4))
    )
    assert snapshot(model) == before
    adapter = resident.bank.add(prepared)
    with pytest.raises(ContainerStateError, match="already"):
        resident.bank.add(prepared)
    resident.bank.remove(adapter)
    with pytest.raises(ContainerStateError, match="not resident"):
        resident.bank.remove(adapter)
    assert snapshot(model) == before


class Life(RuleBasedStateMachine):
    """Any sequence of adding, removing, fusing and failing; undone, the base is bit for bit itself."""

    folders: list[Path]
    expected: list[np.ndarray]
    broken: Path

    def __init__(self) -> None:
        super().__init__()
        self.resident = Resident(tiny_llama())
        self.before = snapshot(self.resident.model)
        self.added: list[tuple[int, ResidentAdapter]] = []
        self.fusion: Any = None

    def teardown(self) -> None:
        if self.fusion is not None:
            self.fusion.undo()
        self.resident.bank.close()
        assert snapshot(self.resident.model) == self.before

    @precondition(lambda self: self.fusion is None)
    @rule(which=st.integers(0, len(RECIPES) - 1))
    def add(self, which: int) -> None:
        self.added.append((which, self.resident.add(self.folders[which])))

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        _, adapter = self.added.pop(data.draw(st.integers(0, len(self.added) - 1)))
        self.resident.bank.remove(adapter)

    @rule()
    def fail_to_add(self) -> None:
        before = snapshot(self.resident.model)
        with pytest.raises(InvalidAdapterError):
            self.resident.add(self.broken)
        assert snapshot(self.resident.model) == before

    @precondition(lambda self: not self.added and self.fusion is None)
    @rule(which=st.integers(0, len(RECIPES) - 1))
    def fuse(self, which: int) -> None:
        self.fusion = AdapterContainer.from_directory(self.folders[which]).fuse(with_=self.resident.model)
        fused = np.array(self.resident.model(tokens(1, 5)))
        assert relative_error(fused, self.expected[which]) < 1e-4

    @precondition(lambda self: self.fusion is not None)
    @rule()
    def unfuse(self) -> None:
        self.fusion.undo()
        self.fusion = None

    @invariant()
    def every_resident_computes_what_it_did(self) -> None:
        if not self.added:
            return
        rows = [only(adapter) for _, adapter in self.added]
        found = self.resident.logits(mx.repeat(tokens(1, 5), len(rows), axis=0), rows)
        for row, (which, _) in enumerate(self.added):
            assert relative_error(found[row], self.expected[which][0]) < 1e-4


def test_any_life_of_a_bank_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    made = [
        make_adapter(tmp_path / str(seed), tiny_llama(), seed=seed, **recipe)
        for seed, recipe in enumerate(RECIPES)
    ]
    answers = [alone(tiny_llama(), folder, tokens(1, 5)) for folder in made]
    values = adapter_values()
    tensors = adapter_tensors(tiny_llama(), values)
    tensors.pop(min(tensors))

    class Here(Life):
        folders = made
        expected = answers
        broken = write_adapter(tmp_path / "broken", values, tensors)

    run_state_machine_as_test(Here, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))

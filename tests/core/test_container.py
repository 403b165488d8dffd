"""A container's life: checked, loaded, unloaded, trained, saved; and everything that must change nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError, UnsupportedModelError
from adapters_core.layers import DoRALinear, LoRALayer, LoRALinear
from adapters_core.surgery import replace_modules
from tests.models import (
    QKV,
    adapter_tensors,
    adapter_values,
    logits,
    make_adapter,
    relative_error,
    snapshot,
    tiny_llama,
    write_adapter,
)

KINDS = ["lora", "dora"]
Q0 = "model.layers.0.self_attn.q_proj"


class _Standing(nn.Module):
    """A wrapper as a bank puts into a model."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)

    def reverted(self) -> nn.Module:
        return self.linear


def _config(kind: str = "lora", **values: Any) -> AdapterConfig:
    return AdapterConfig.from_values(adapter_values(kind, **values), "test")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_unload_leaves_the_model_bit_for_bit_as_it_was(tmp_path: Path, kind: str, bits: int | None) -> None:
    model = tiny_llama(0, bits)
    model.layers[0].train()
    model.layers[1].freeze()
    before, base = snapshot(model), logits(model)
    container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model, kind, keys=None))
    for _ in range(2):
        container.load(into=model)
        assert relative_error(logits(model), base) > 0.01
        container.unload(from_=model)
        assert snapshot(model) == before
        np.testing.assert_array_equal(logits(model), base)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_after_a_load_whatever_the_model_does(tmp_path: Path, kind: str) -> None:
    model = tiny_llama()
    values = adapter_values(kind)
    values["lora_parameters"]["dropout"] = 0.9
    container = AdapterContainer.from_directory(
        write_adapter(tmp_path / "a", values, adapter_tensors(model, values))
    )
    container.load(into=model)
    loaded = logits(model)
    np.testing.assert_array_equal(logits(model), loaded)
    assert not any(module.training for module in model.modules())
    model.train()
    assert relative_error(logits(model), loaded) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_loading_and_fusing_leave_the_random_state_alone(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(0, 4)
    container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model, kind))
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    container.load(into=model)
    container.fuse(with_=model)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_container_is_loaded_once_and_unloaded_where_it_is(tmp_path: Path) -> None:
    model, other = tiny_llama(0), tiny_llama(1)
    first = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model))
    second = AdapterContainer.from_directory(make_adapter(tmp_path / "b", model, "dora", seed=2, keys=None))
    base = snapshot(model)
    first.load(into=model)
    loaded, untouched = snapshot(model), snapshot(other)
    for call in (
        lambda: first.load(into=model),
        lambda: first.load(into=other),
        lambda: second.load(into=model),
        lambda: second.check(model),
        lambda: second.fuse(with_=model),
        lambda: second.unload(from_=model),
        lambda: first.unload(from_=other),
        lambda: AdapterContainer.from_model(model, _config()),
    ):
        with pytest.raises(ContainerStateError):
            call()
        assert snapshot(model) == loaded
        assert snapshot(other) == untouched
    second.load(into=other)
    first.unload(from_=model)
    with pytest.raises(ContainerStateError, match="not loaded"):
        first.unload(from_=model)
    assert snapshot(model) == base


def test_a_model_that_another_library_adapted_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = make_adapter(tmp_path / "a", model)
    load_adapters(model, str(folder))
    before = snapshot(model)
    container = AdapterContainer.from_directory(folder)
    for call in (
        container.load,
        container.fuse,
        container.check,
        lambda m: AdapterContainer.from_model(m, _config()),
    ):
        with pytest.raises(ContainerStateError, match="without an adapter"):
            call(model)
        assert snapshot(model) == before


def test_a_check_sees_through_a_banks_wrappers_and_a_load_refuses_them(tmp_path: Path) -> None:
    model = tiny_llama()
    container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model))
    bare = container.check(model)
    replace_modules(model, {Q0: _Standing(model.layers[0].self_attn.q_proj)})
    before = snapshot(model)
    wrapped = container.check(model)
    assert wrapped.keys() == bare.keys()
    assert all(wrapped[path].lora_a is bare[path].lora_a for path in bare)
    for call in (container.load, container.fuse, lambda m: AdapterContainer.from_model(m, _config())):
        with pytest.raises(ContainerStateError):
            call(model)
        assert snapshot(model) == before


def test_the_layers_keep_the_seeds_protocol(tmp_path: Path) -> None:
    for bits in (None, 4):
        model = tiny_llama(0, bits)
        bases = {path: module for path, module in model.named_modules() if path.endswith("q_proj")}
        container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model))
        container.load(into=model)
        for path, module in model.named_modules():
            if path in bases:
                assert isinstance(module, LoRALayer)
                assert module.reverted() is bases[path]
                assert type(module.fused()) is type(bases[path])
                assert module.fused() is not bases[path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_ready_for_training_and_leaves_exactly(kind: str) -> None:
    model = tiny_llama(0, 4)
    before, base = snapshot(model), logits(model)
    mx.random.seed(11)
    container = AdapterContainer.from_model(model, _config(kind, rank=5, keys=None, num_layers=2))
    assert dict(tree_flatten(model.trainable_parameters())).keys() == container.parameters.keys()
    assert len(container.parameters) == 2 * 7 * (2 if kind == "lora" else 3)
    assert all(module.training for module in model.modules())
    for layer in model.modules():
        if isinstance(layer, LoRALinear | DoRALinear):
            a = np.array(layer.lora_a)
            bound = 1 / np.sqrt(a.shape[0])
            assert 0.8 * bound < np.abs(a).max() <= bound
            assert abs(a.mean()) < 0.2 * bound
            assert not np.array(layer.lora_b).any()
    assert relative_error(logits(model), base) < 1e-6
    kept = container.parameters
    container.unload(from_=model)
    assert snapshot(model) == before
    assert all(container.parameters[name] is kept[name] for name in kept)
    container.load(into=model)
    assert relative_error(logits(model), base) < 1e-6


def test_a_new_adapter_with_keys_that_match_nothing_changes_nothing() -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError, match="nonsense"):
        AdapterContainer.from_model(model, _config(keys=["nonsense"]))
    with pytest.raises(UnsupportedModelError):
        AdapterContainer.from_model(nn.Linear(2, 2), _config())
    assert snapshot(model) == before


def test_parameters_and_digest_follow_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model, "dora"))
    digest, size_bytes = container.digest, container.size_bytes
    container.load(into=model)
    assert container.digest == digest
    base = logits(model)
    layer: Any = model.layers[0].self_attn.q_proj
    layer.m = layer.m * 2
    assert relative_error(logits(model), base) > 0.01
    assert container.digest != digest
    assert container.size_bytes == size_bytes
    container.save(tmp_path / "b")
    container.unload(from_=model)
    assert AdapterContainer.from_directory(tmp_path / "b").digest == container.digest != digest


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [("scale", 3.0, False), ("dropout", 0.5, True), ("seed", 4, True), ("fine_tune_type", "dora", False)],
)
def test_the_digest_covers_what_the_adapter_computes(
    tmp_path: Path, field: str, value: object, same: bool
) -> None:
    values = adapter_values()
    tensors = adapter_tensors(tiny_llama(), values)
    digest = AdapterContainer.from_directory(write_adapter(tmp_path / "a", values, tensors)).digest
    changed = json.loads(json.dumps(values))
    (changed["lora_parameters"] if field in ("scale", "dropout") else changed)[field] = value
    other = AdapterContainer.from_directory(write_adapter(tmp_path / "b", changed, tensors)).digest
    assert (digest == other) is same


def test_save_replaces_whole_files_and_leaves_no_others(tmp_path: Path) -> None:
    model = tiny_llama()
    first = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model))
    second = AdapterContainer.from_directory(make_adapter(tmp_path / "b", model, "dora", seed=2))
    for container in (first, second):
        container.save(tmp_path / "deep" / "saved")
        assert AdapterContainer.from_directory(tmp_path / "deep" / "saved").digest == container.digest
    assert sorted(os.listdir(tmp_path / "deep" / "saved")) == ["adapter_config.json", "adapters.safetensors"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        first.save(tmp_path / "file")


def test_a_container_read_on_another_thread_is_loaded_here(tmp_path: Path) -> None:
    model, theirs = tiny_llama(), tiny_llama()
    folder = make_adapter(tmp_path / "a", model, "dora")
    read: list[AdapterContainer] = []
    thread = threading.Thread(target=lambda: read.append(AdapterContainer.from_directory(folder)))
    thread.start()
    thread.join()
    read[0].load(into=model)
    load_adapters(theirs, str(folder))
    theirs.eval()
    assert relative_error(logits(model), logits(theirs)) < 1e-4


Tensors = dict[str, mx.array]
Values = dict[str, Any]


def _without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing a": (lambda t: _without(t, f"{Q0}.lora_a"), f"{Q0}.lora_a: expected shape (64, 4)"),
    "missing b": (lambda t: _without(t, f"{Q0}.lora_b"), f"{Q0}.lora_b: expected shape (4, 64)"),
    "whole module missing": (lambda t: _without(t, f"{Q0}.lora_a", f"{Q0}.lora_b", f"{Q0}.m"), Q0),
    "a transposed": (lambda t: {**t, f"{Q0}.lora_a": t[f"{Q0}.lora_a"].T}, "got (4, 64)"),
    "another rank": (lambda t: {**t, f"{Q0}.lora_b": mx.zeros((6, 64))}, "(rank 4), got (6, 64)"),
    "another width": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((96, 4))}, "got (96, 4)"),
    "a vector": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((256,))}, "got (256,)"),
    "no rank": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((64, 0))}, "got (64, 0)"),
    "unknown layer": (
        lambda t: {**t, "model.layers.9.self_attn.q_proj.lora_a": mx.zeros((64, 4))},
        "no module model.layers.9.self_attn.q_proj",
    ),
    "untargeted module": (lambda t: {**t, "lm_head.lora_a": mx.zeros((64, 4))}, "leaves this module out"),
    "other weights": (lambda t: {**t, "model.norm.weight": mx.zeros((64,))}, "not the name of an adapter's"),
    "bare name": (lambda t: {**t, "lora_a": mx.zeros((64, 4))}, "lora_a: not expected"),
    "PEFT names": (
        lambda t: {f"base_model.model.{name}.weight": tensor for name, tensor in t.items()},
        "not the name of an adapter's tensor",
    ),
    "integers": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((64, 4), mx.int32)}, "got I32"),
    "NaN": (lambda t: {**t, f"{Q0}.lora_a": mx.full((64, 4), mx.nan)}, "NaN or infinite"),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path: Path, bits: int | None, kind: str, case: str
) -> None:
    change, expected = BAD_TENSORS[case]
    model = tiny_llama(0, bits)
    values = adapter_values(kind)
    folder = write_adapter(tmp_path / "bad", values, change(adapter_tensors(model, values)))
    before, base = snapshot(model), logits(model)
    for act in (AdapterContainer.load, AdapterContainer.fuse, AdapterContainer.check):
        with pytest.raises(InvalidAdapterError) as caught:
            act(AdapterContainer.from_directory(folder), model)
        assert caught.value.source == "bad"
        assert any(expected in problem for problem in caught.value.problems)
        assert str(tmp_path) not in str(caught.value)
    assert snapshot(model) == before
    np.testing.assert_array_equal(logits(model), base)


BAD_VALUES: dict[str, tuple[Callable[[Values], None], str]] = {
    "other rank": (
        lambda v: v["lora_parameters"].update(rank=8),
        "expected shape (64, 8) (rank 8), got (64, 4)",
    ),
    "fewer layers": (lambda v: v.update(num_layers=1), "leaves this module out (num_layers 1"),
    "other keys": (lambda v: v["lora_parameters"].update(keys=QKV[:2]), "leaves this module out"),
    "more keys": (lambda v: v["lora_parameters"].update(keys=[*QKV, "mlp.up_proj"]), "the file has none"),
    "all keys": (lambda v: v["lora_parameters"].update(keys=None), "the file has none"),
    "no such key": (
        lambda v: v["lora_parameters"].update(keys=[*QKV, "mlp.nope"]),
        "'mlp.nope' matches no module",
    ),
    "embedding": (lambda v: v["lora_parameters"].update(keys=[*QKV, "model.embed_tokens"]), "Embedding"),
    "impossible rank": (lambda v: v["lora_parameters"].update(rank=-1), "rank: expected a whole number"),
    "infinite scale": (lambda v: v["lora_parameters"].update(scale=1e400), "Infinity"),
    "full": (lambda v: v.update(fine_tune_type="full"), "Serve the folder as a model"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_configs_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path, case: str) -> None:
    change, expected = BAD_VALUES[case]
    model = tiny_llama()
    values = adapter_values()
    tensors = adapter_tensors(model, values)
    change(values)
    folder = write_adapter(tmp_path / "bad", values, tensors)
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).load(into=model)
    assert any(expected in problem for problem in caught.value.problems)
    assert snapshot(model) == before


def test_a_dora_needs_magnitudes_and_a_lora_has_none(tmp_path: Path) -> None:
    model = tiny_llama()
    lora, dora = adapter_values("lora"), adapter_values("dora")
    without = write_adapter(tmp_path / "without", dora, adapter_tensors(model, lora))
    with_ = write_adapter(tmp_path / "with", lora, adapter_tensors(model, dora))
    with pytest.raises(InvalidAdapterError, match=r"\.m: expected shape \(64,\)") as missing:
        AdapterContainer.from_directory(without).check(model)
    with pytest.raises(InvalidAdapterError, match="a magnitude, but fine_tune_type is lora") as extra:
        AdapterContainer.from_directory(with_).check(model)
    assert len(missing.value.problems) == len(extra.value.problems) == 9


def test_the_problems_of_both_files_come_in_one_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "no such folder"):
        with pytest.raises(InvalidAdapterError) as caught:
            AdapterContainer.from_directory(folder)
        assert [problem.split(":")[0] for problem in caught.value.problems] == [
            "adapter_config.json",
            "adapters.safetensors",
        ]


def test_every_problem_of_a_misfit_is_listed(tmp_path: Path) -> None:
    model = tiny_llama()
    values = adapter_values(keys=[*QKV, "nope"])
    tensors = adapter_tensors(model, adapter_values())
    tensors.pop(f"{Q0}.lora_a")
    tensors["lm_head.lora_b"] = mx.zeros((4, 96))
    tensors["model.layers.1.self_attn.k_proj.lora_b"] = mx.zeros((4, 31))
    folder = write_adapter(tmp_path / "bad", values, tensors)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).check(model)
    assert len(caught.value.problems) == 4
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_an_adapter_of_another_model_is_refused_in_full(tmp_path: Path) -> None:
    small = tiny_llama(hidden_size=32, num_hidden_layers=4)
    model = tiny_llama()
    folder = make_adapter(tmp_path / "a", small, keys=None)
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).load(into=model)
    assert len(caught.value.problems) > 14
    assert snapshot(model) == before


class LifeCycle(RuleBasedStateMachine):
    """Any sequence of loads, fuses, failures and their undoing leaves the base as it was."""

    folder: Path

    @initialize(bits=st.sampled_from([None, 4]))
    def start(self, bits: int | None) -> None:
        self.model = tiny_llama(0, bits, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
        self.base = snapshot(self.model)
        self.undo: list[Callable[[], None]] = []
        self.containers = {
            kind: AdapterContainer.from_directory(
                make_adapter(self.folder / f"{kind}{bits}", self.model, kind, keys=None)
            )
            for kind in KINDS
        }
        self.loaded: AdapterContainer | None = None

    @precondition(lambda self: self.loaded is None)
    @rule(kind=st.sampled_from(KINDS))
    def load(self, kind: str) -> None:
        container = self.containers[kind]
        container.load(into=self.model)
        self.loaded = container

        def unload() -> None:
            container.unload(from_=self.model)
            self.loaded = None

        self.undo.append(unload)

    @precondition(lambda self: self.loaded is None)
    @rule(kind=st.sampled_from(KINDS))
    def train_a_new_one(self, kind: str) -> None:
        container = AdapterContainer.from_model(self.model, _config(kind))
        self.loaded = container

        def unload() -> None:
            container.unload(from_=self.model)
            self.loaded = None

        self.undo.append(unload)

    @precondition(lambda self: len(self.undo) < 4)
    @rule(kind=st.sampled_from(KINDS), precision=st.sampled_from(["auto", "requantize", "dequantize"]))
    def fuse(self, kind: str, precision: Any) -> None:
        loaded = self.loaded
        fusion = (loaded or self.containers[kind]).fuse(with_=self.model, precision=precision)
        self.loaded = None

        def undo() -> None:
            fusion.undo()
            self.loaded = loaded

        self.undo.append(undo)

    @precondition(lambda self: self.loaded is not None)
    @rule(kind=st.sampled_from(KINDS))
    def fail_to_load(self, kind: str) -> None:
        before = snapshot(self.model)
        with pytest.raises(ContainerStateError):
            self.containers[kind].load(into=self.model)
        assert snapshot(self.model) == before

    @precondition(lambda self: self.undo)
    @rule()
    def undo_the_last(self) -> None:
        self.undo.pop()()

    @invariant()
    def nothing_is_left_once_all_is_undone(self) -> None:
        if not self.undo:
            assert snapshot(self.model) == self.base

    def teardown(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.nothing_is_left_once_all_is_undone()


def test_any_life_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    class Here(LifeCycle):
        folder = tmp_path

    run_state_machine_as_test(Here, settings=settings(max_examples=30, stateful_step_count=12, deadline=None))

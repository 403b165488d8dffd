"""A container's life: checked, loaded, unloaded, trained, saved."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError, UnsupportedModelError
from adapters_core.layers.kinds import DoRALinear, LoRALayer, LoRALinear
from adapters_core.layers.surgery import replace_modules
from tests.models import (
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

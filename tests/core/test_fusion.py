"""Fusing: equal to applying, honest about what quantising again loses, and undone exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.tuner.utils import load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError
from adapters_core.fusing.fusion import AUTO_THRESHOLD, Precision
from adapters_core.layers.kinds import DoRALinear, LoRALinear
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import dense_weight
from adapters_core.layers.targets import module_at
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


def _container(folder: Path, model: nn.Module, kind: str = "lora", size: float = 0.2) -> AdapterContainer:
    return AdapterContainer.from_directory(make_adapter(folder, model, kind, keys=None, size=size))


def _attention(model: llama.Model, layer: int, key: str) -> Any:
    return model.layers[layer].self_attn[key.removeprefix("self_attn.")]


def _types(model: nn.Module) -> set[type]:
    return {type(module) for path, module in model.named_modules() if path.endswith("_proj")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_dense_model_fused_computes_what_it_did_with_the_adapter(
    tmp_path: Path, kind: str, loaded_first: bool
) -> None:
    model = tiny_llama()
    container = _container(tmp_path / "a", model, kind)
    before = snapshot(model)
    container.load(into=model)
    applied = logits(model)
    if not loaded_first:
        container.unload(from_=model)
    start = snapshot(model)

    fusion = container.fuse(with_=model)

    assert relative_error(logits(model), applied) < 1e-4
    assert _types(model) == {nn.Linear}
    report = fusion.report
    assert report.modules == 21
    assert report.precision == {"dense": 21}
    assert 0 <= report.error_mean <= report.error_worst < 1e-5
    assert (report.worst_module is None) == (report.error_worst == 0)
    with pytest.raises(ContainerStateError):
        container.unload(from_=model)
    fusion.undo()
    assert snapshot(model) == start
    if loaded_first:
        np.testing.assert_array_equal(logits(model), applied)
        container.unload(from_=model)
    assert snapshot(model) == before
    with pytest.raises(ContainerStateError):
        fusion.undo()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "mode"), [(3, "affine"), (4, "affine"), (6, "affine"), (8, "affine"), (4, "mxfp4")]
)
def test_dequantising_computes_what_the_adapted_model_did(
    tmp_path: Path, kind: str, bits: int, mode: str
) -> None:
    model = tiny_llama(0, bits, mode=mode)
    container = _container(tmp_path / "a", model, kind)
    before = snapshot(model)
    container.load(into=model)
    applied = logits(model)
    fusion = container.fuse(with_=model, precision="dequantize")
    assert _types(model) == {nn.Linear}
    assert fusion.report.precision == {"dense": 21}
    # Without float scales the layer computes in its bias' type, as a dense one does.
    assert relative_error(logits(model), applied) < 1e-4
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float32
    fusion.undo()
    container.unload(from_=model)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_requantising_keeps_the_quantisation_and_reports_what_is_lost(
    tmp_path: Path, kind: str, bits: int
) -> None:
    model = tiny_llama(0, bits)
    container = _container(tmp_path / "a", model, kind)
    bases = {path: module for path, module in model.named_modules() if path.endswith("_proj")}
    weights = {path: dense_weight(module) for path, module in bases.items()}
    container.load(into=model)
    exact = {
        path: module.fused_weight()
        for path, module in model.named_modules()
        if hasattr(module, "fused_weight")
    }
    report = container.fuse(with_=model, precision="requantize").report

    assert report.precision == {"requantized": 21}
    errors = {}
    for path, module in model.named_modules():
        if path in exact:
            assert isinstance(module, nn.QuantizedLinear)
            assert (module.bits, module.group_size, module.mode) == (bits, 32, "affine")
            assert module.scales.dtype == bases[path].scales.dtype
            assert module.bias is bases[path].bias
            change = exact[path] - weights[path]
            lost = (dense_weight(module) - weights[path]) - change
            errors[path] = (mx.linalg.norm(lost) / mx.linalg.norm(change)).item()
    assert report.error_mean == pytest.approx(np.mean(list(errors.values())), rel=1e-4)
    assert report.error_worst == pytest.approx(max(errors.values()), rel=1e-4)
    assert errors[str(report.worst_module)] == pytest.approx(report.error_worst, rel=1e-4)
    assert report.error_worst > 0


def test_auto_quantises_again_only_what_keeps_its_change(tmp_path: Path) -> None:
    model = tiny_llama(0, 8)
    values = adapter_values()
    tensors = adapter_tensors(model, values, size=0.5)
    small = [name for name in tensors if name.startswith("model.layers.1.") and name.endswith("lora_b")]
    container = AdapterContainer.from_directory(
        write_adapter(tmp_path / "a", values, {**tensors, **{name: tensors[name] * 1e-3 for name in small}})
    )
    container.load(into=model)
    exact = {f"model.layers.1.{key}": _attention(model, 1, key).fused_weight() for key in QKV}
    report = container.fuse(with_=model, precision="auto").report
    assert report.precision == {"requantized": 6, "kept_dense": 3}
    assert report.threshold == AUTO_THRESHOLD
    assert report.error_worst <= AUTO_THRESHOLD
    kinds = {
        path: type(m) for path, m in model.named_modules() if path.removeprefix("model.layers.")[2:] in QKV
    }
    assert {path for path, kind in kinds.items() if kind is nn.Linear} == {
        f"model.layers.1.{key}" for key in QKV
    }
    for path, weight in exact.items():
        assert relative_error(np.array(module_at(model, path).weight), np.array(weight)) < 1e-6


def test_an_adapter_without_effect_fuses_without_error(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    values = adapter_values()
    tensors = {
        name: mx.zeros_like(tensor) if name.endswith("lora_b") else tensor
        for name, tensor in adapter_tensors(model, values).items()
    }
    base = logits(model)
    container = AdapterContainer.from_directory(write_adapter(tmp_path / "a", values, tensors))
    for precision, outcome in (
        ("auto", "requantized"),
        ("requantize", "requantized"),
        ("dequantize", "dense"),
        ("keep", "unmerged"),
    ):
        fusion = container.fuse(with_=model, precision=precision)  # pyright: ignore[reportArgumentType]
        assert fusion.report.precision == {outcome: 9}
        assert fusion.report.error_worst == 0.0
        assert relative_error(logits(model), base) < 1e-5
        fusion.undo()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("precision", ["auto", "requantize", "dequantize"])
def test_fused_layers_keep_the_compute_dtype(
    tmp_path: Path, dtype: mx.Dtype, bits: int | None, precision: Precision
) -> None:
    model = tiny_llama()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    container = _container(tmp_path / "a", model)
    container.load(into=model)
    applied = logits(model)
    report = container.fuse(with_=model, precision=precision).report
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            assert (module.scales if isinstance(module, nn.QuantizedLinear) else module.weight).dtype == dtype
    if precision == "requantize" and bits:
        assert AUTO_THRESHOLD < report.error_mean < 0.5
    else:
        assert relative_error(logits(model), applied) < 0.15


def test_fusing_equals_mlx_lms_own_fuse(tmp_path: Path) -> None:
    for kind in KINDS:
        for bits in (None, 8):
            ours, theirs = tiny_llama(0, bits), tiny_llama(0, bits)
            folder = make_adapter(tmp_path / f"{kind}{bits}", ours, kind)
            load_adapters(theirs, str(folder))
            fused = AdapterContainer.from_directory(folder).fused_modules(ours, "requantize")[0]
            expected = _attention(theirs, 0, "q_proj").fuse()
            assert type(fused[Q0]) is type(expected)
            x = mx.random.normal((3, 64), key=mx.random.key(1))
            assert relative_error(np.array(fused[Q0](x)), np.array(expected(x))) < 1e-3


def test_fused_modules_alone_change_nothing(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    container = _container(tmp_path / "a", model, "dora")
    before = snapshot(model)
    modules, report = container.fused_modules(model, "dequantize")
    assert len(modules) == report.modules == 21
    assert snapshot(model) == before


def test_weights_that_overflow_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    model.set_dtype(mx.float16)
    values = adapter_values(scale=1e5)
    container = AdapterContainer.from_directory(
        write_adapter(tmp_path / "a", values, adapter_tensors(model, values, size=3))
    )
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError, match="expected finite weights") as caught:
        container.fuse(with_=model)
    assert len(caught.value.problems) == 9
    assert snapshot(model) == before
    container.load(into=model)
    with pytest.raises(InvalidAdapterError):
        container.fuse(with_=model)
    container.unload(from_=model)
    assert snapshot(model) == before


def test_an_unknown_precision_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    container = _container(tmp_path / "a", model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="auto"):
        container.fuse(with_=model, precision="best")  # pyright: ignore[reportArgumentType]
    assert snapshot(model) == before


def test_a_fused_model_takes_another_adapter_and_undoes_in_order(tmp_path: Path) -> None:
    model = tiny_llama()
    first, second = _container(tmp_path / "a", model), _container(tmp_path / "b", model, "dora")
    before = snapshot(model)
    fusion = first.fuse(with_=model)
    fused = snapshot(model)
    second.load(into=model)
    with pytest.raises(ContainerStateError, match="undo the later change first"):
        fusion.undo()
    second.unload(from_=model)
    assert snapshot(model) == fused
    fusion.undo()
    assert snapshot(model) == before


def test_fusing_after_training_restores_the_models_modes() -> None:
    model = tiny_llama()
    before = {path: (module.training, set(module._no_grad)) for path, module in model.named_modules()}
    container = AdapterContainer.from_model(model, AdapterConfig.from_values(adapter_values(), "test"))
    training = snapshot(model)
    fusion = container.fuse(with_=model)
    assert {path: (module.training, set(module._no_grad)) for path, module in model.named_modules()} == before
    fusion.undo()
    assert snapshot(model) == training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 3, 4, 6, 8])
def test_forward_and_fused_weight_agree_without_a_bias(kind: str, bits: int | None) -> None:
    mx.random.seed(2)
    linear: nn.Module = nn.Linear(96, 48, bias=False)
    if bits:
        linear = linear.to_quantized(32, bits)
    weights = ModuleWeights(mx.random.normal((96, 3)), mx.random.normal((3, 48)), mx.ones((48,)) * 2, 0.7)
    if kind == "lora":
        weights = ModuleWeights(weights.lora_a, weights.lora_b, None, weights.scale)
    layer = (LoRALinear if kind == "lora" else DoRALinear)(linear, weights, 0.0)
    x = mx.random.normal((2, 5, 96))
    assert relative_error(np.array(layer(x)), np.array(x @ layer.fused_weight().T)) < 1e-5
    if kind == "dora":
        rows = mx.linalg.norm(layer.fused_weight(), axis=1)
        np.testing.assert_allclose(np.array(rows), 2.0, rtol=1e-5)

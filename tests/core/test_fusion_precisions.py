"""The four precisions on bases of several widths: the form that each layer gets, its cost, its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.fusing.forms import size_bytes
from adapters_core.fusing.fusion import AUTO_THRESHOLD, Precision, fuse_layers
from adapters_core.layers.kinds import AdaptedLayer, with_weights
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import compute_dtype, dense_weight
from adapters_core.layers.targets import named_modules
from tests.models import QKV, adapter_tensors, adapter_values, logits, snapshot, tiny_llama, write_adapter

BITS = [None, 8, 6, 4, 3]


def _adapter(folder: Path, model: nn.Module, size: float = 0.2, kind: str = "lora") -> AdapterContainer:
    values = adapter_values(kind)
    tensors = adapter_tensors(model, values, size=size)
    # Layers whose changes differ by magnitudes, so that each needs another form.
    shrink = {"model.layers.1.": 0.3, "model.layers.2.": 0.01}
    for name in tensors:
        for prefix, factor in shrink.items():
            if name.startswith(prefix) and name.endswith("lora_b"):
                tensors[name] = tensors[name] * factor
    return AdapterContainer.from_directory(write_adapter(folder, values, tensors))


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {path: module for path, module in named_modules(model) if isinstance(module, AdaptedLayer)}


def _error(base: nn.Module, exact: mx.array, weight: mx.array) -> float:
    """‖(W' - W) - Δ‖ / ‖Δ‖, in float64 of NumPy's."""
    before = np.array(dense_weight(base).astype(mx.float32), dtype=np.float64)
    change = np.array(exact, dtype=np.float64) - before
    kept = np.array(weight.astype(mx.float32), dtype=np.float64) - before
    return float(np.linalg.norm(kept - change) / np.linalg.norm(change))


def _rounded(base: Any, exact: mx.array, group_size: int, bits: int) -> mx.array:
    packed = mx.quantize(exact.astype(compute_dtype(base)), group_size, bits)
    return mx.dequantize(*packed, group_size=group_size, bits=bits)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("bits", BITS)
def test_each_precision_gives_the_form_that_it_names(
    tmp_path: Path, bits: int | None, precision: Precision
) -> None:
    model = tiny_llama(0, bits)
    adapter = _adapter(tmp_path / "a", model)
    untouched = snapshot(model)
    adapter.load(into=model)
    applied = logits(model)
    layers = _adapted(model)
    exact = {path: layer.fused_weight() for path, layer in layers.items()}
    bases = {path: layer.reverted() for path, layer in layers.items()}
    before = snapshot(model)
    fusion = adapter.fuse(with_=model, precision=precision)
    report, fused = fusion.report, dict(named_modules(model))

    forms = set(report.precision)
    if precision == "keep":
        assert report.precision == {"unmerged": 9}
    elif bits is None or precision == "dequantize":
        assert report.precision == {"dense": 9}
    elif precision == "requantize":
        assert report.precision == {"requantized": 9}
    else:
        finer = {"requantized_8bit"} if bits < 8 else set()
        assert forms <= {"requantized", "kept_dense"} | finer
        assert "kept_dense" in forms

    errors = {}
    for path, base in bases.items():
        if precision == "keep":
            errors[path] = 0.0
            assert cast(Any, fused[path]).reverted() is base
        else:
            errors[path] = _error(base, exact[path], dense_weight(fused[path]))
    assert report.error_mean == pytest.approx(np.mean(list(errors.values())), rel=1e-3, abs=1e-6)
    assert report.error_worst == pytest.approx(max(errors.values()), rel=1e-3, abs=1e-6)
    assert report.bytes_before == sum(size_bytes(base) for base in bases.values())
    assert report.bytes_after == sum(
        array.nbytes for path in bases for _, array in cast("Any", tree_flatten(fused[path].parameters()))
    )
    if precision == "requantize":
        assert report.bytes_after == report.bytes_before
    if precision in ("keep", "dequantize"):
        assert np.abs(logits(model) - applied).max() < 1e-4
    fusion.undo()
    assert snapshot(model) == before
    adapter.unload(from_=model)
    assert snapshot(model) == untouched


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.01, AUTO_THRESHOLD, 0.3, 1e9])
def test_auto_takes_the_smallest_form_within_the_threshold(
    tmp_path: Path, bits: int, threshold: float
) -> None:
    model = tiny_llama(0, bits)
    adapter = _adapter(tmp_path / "a", model)
    adapter.load(into=model)
    layers = _adapted(model)
    modules, report = fuse_layers(layers, "auto", "a", threshold=threshold)
    assert report.threshold == threshold
    if threshold:
        assert report.error_worst <= threshold
    for path, layer in layers.items():
        base = cast(Any, layer.reverted())
        exact = layer.fused_weight()
        errors = {(width, 32): _error(base, exact, _rounded(base, exact, 32, width)) for width in {bits, 8}}
        expected = [width for width, _ in sorted(errors) if errors[width, 32] <= threshold]
        module = cast(Any, modules[path])
        assert (module.bits if isinstance(module, nn.QuantizedLinear) else None) == (
            expected[0] if expected else None
        )
        assert module.get("bias") is base.bias


def test_the_error_of_a_4_bit_base_stays_within_five_percent(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    adapter = _adapter(tmp_path / "a", model, size=0.1)
    lossy = adapter.fused_modules(model, "requantize")[1]
    kept = adapter.fused_modules(model, "auto")[1]
    dense = adapter.fused_modules(model, "dequantize")[1]
    assert lossy.error_mean > 0.5
    assert kept.error_mean <= kept.error_worst <= 0.05
    assert lossy.bytes_after < kept.bytes_after <= dense.bytes_after


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_without_float_scales(tmp_path: Path, mode: str) -> None:
    group_size, bits = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[mode]
    model = tiny_llama(0, bits, group_size=group_size, mode=mode)
    adapter = _adapter(tmp_path / "a", model, size=0.5)
    modules, report = adapter.fused_modules(model, "auto")
    assert report.error_worst <= AUTO_THRESHOLD
    for module in cast("list[Any]", list(modules.values())):
        if isinstance(module, nn.QuantizedLinear) and module.mode == "affine":
            assert (module.bits, module.group_size) == (8, 32)
    assert sum(report.precision.values()) == 9


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_keeping_is_exact_and_leaves_nothing_to_train(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(0, 4)
    adapter = _adapter(tmp_path / "a", model, kind=kind)
    adapter.load(into=model)
    applied = logits(model)
    adapter.unload(from_=model)
    model.freeze()
    before = snapshot(model)
    fusion = adapter.fuse(with_=model, precision="keep")
    np.testing.assert_array_equal(logits(model), applied)
    assert not tree_flatten(model.trainable_parameters())
    assert (fusion.report.error_mean, fusion.report.error_worst) == (0.0, 0.0)
    factors = sum(array.nbytes for array in adapter.parameters.values())
    assert fusion.report.bytes_after == fusion.report.bytes_before + factors
    fusion.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_tied_embedding_takes_the_head_along(bits: int | None, precision: Precision) -> None:
    model: Any = tiny_llama(0, bits, tie_word_embeddings=True)
    path = "model.embed_tokens"
    base = cast(Any, model.model.embed_tokens)
    layer = _random_layer(base, (96, 4), (4, 64))
    model.model.embed_tokens = layer
    applied = logits(model)
    modules, report = fuse_layers({path: layer}, precision, "e")
    model.model.embed_tokens = modules[path]
    assert report.modules == 1
    if precision in ("keep", "dequantize"):
        assert np.abs(logits(model) - applied).max() < 1e-4
    if bits and precision != "keep":
        kind = nn.Embedding if set(report.precision) & {"dense", "kept_dense"} else nn.QuantizedEmbedding
        assert type(modules[path]) is kind
        assert (modules[path](mx.array([3])).shape, logits(model).shape[-1]) == ((1, 64), 96)
    if precision == "auto":
        assert report.error_worst <= AUTO_THRESHOLD


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("precision", get_args(Precision))
def test_experts_are_fused_each_with_its_own_factors(bits: int | None, precision: Precision) -> None:
    mx.random.seed(0)
    base: Any = SwitchLinear(64, 32, 4, bias=False)
    if bits:
        base = base.to_quantized(32, bits)
    layer = _random_layer(base, (4, 2, 64), (4, 32, 2))
    modules, report = fuse_layers({"e": layer}, precision, "e")
    x = mx.random.normal((5, 1, 1, 64))
    indices = mx.array([[0, 2], [1, 3], [2, 2], [3, 0], [1, 1]])
    expected, actual = np.array(layer(x, indices)), np.array(cast(Any, modules["e"])(x, indices))
    if precision in ("keep", "dequantize") or bits is None:
        assert np.abs(actual - expected).max() < 1e-4
    if precision == "auto":
        assert report.error_worst <= AUTO_THRESHOLD
    if bits and precision == "requantize":
        assert type(modules["e"]) is QuantizedSwitchLinear
        assert cast(Any, modules["e"]).bits == bits


def test_a_mixture_of_experts_fuses_as_it_computes() -> None:
    mx.random.seed(0)
    model: Any = qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe", hidden_size=64, num_hidden_layers=2, intermediate_size=64,
            num_attention_heads=4, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
            mlp_only_layers=[], moe_intermediate_size=32, rms_norm_eps=1e-5, vocab_size=96,
            num_key_value_heads=2, head_dim=16, rope_theta=1e4, tie_word_embeddings=True,
            max_position_embeddings=256, norm_topk_prob=True,
        )
    )  # fmt: skip
    model.eval()
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    block = model.layers[1].mlp.switch_mlp
    layer = _random_layer(block.up_proj, (4, 2, 64), (4, 32, 2))
    plain = logits(model)
    block.up_proj = layer
    applied = logits(model)
    modules, _ = fuse_layers({path: layer}, "auto", "e")
    block.up_proj = modules[path]
    assert np.abs(applied - plain).max() > 1e-3
    assert np.abs(logits(model) - applied).max() < 1e-4


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("precision", get_args(Precision))
def test_an_adapters_own_bias_is_fused_with_it(
    bits: int | None, has_bias: bool, precision: Precision
) -> None:
    mx.random.seed(3)
    base: Any = nn.Linear(64, 32, bias=has_bias)
    if bits:
        base = base.to_quantized(32, bits)
    bias = mx.random.normal((32,))
    for b in (mx.random.normal((4, 32)), mx.zeros((4, 32))):
        weights = ModuleWeights(mx.random.normal((64, 4)), b, None, 0.5, bias)
        layer = with_weights(base, weights, _lora_config())
        module = cast(Any, fuse_layers({"q": layer}, precision, "b")[0]["q"])
        expected = np.array(layer(mx.zeros((1, 64))))
        np.testing.assert_allclose(np.array(module(mx.zeros((1, 64)))), expected, atol=1e-5)


def test_progress_is_told_layer_by_layer(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = _adapter(tmp_path / "a", model)
    adapter.load(into=model)
    told: list[tuple[int, int]] = []
    fuse_layers(_adapted(model), "auto", "a", progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(QKV) * 3) for done in range(1, 10)]


def _random_layer(base: nn.Module, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> AdaptedLayer:
    rng = np.random.default_rng(5)
    a, b = (mx.array(rng.normal(0, 0.3, shape), dtype=mx.float32) for shape in (a_shape, b_shape))
    layer = with_weights(base, ModuleWeights(a, b, None, 0.5), _lora_config())
    layer.eval()
    return layer


def _lora_config() -> Any:
    return AdapterConfig.from_values(adapter_values(), "test")

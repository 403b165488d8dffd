"""The comparison of outputs: its numbers, recomputed with NumPy from separate forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import mixtral

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.fusing.activations import ActivationReport, compare_activations
from adapters_core.fusing.dense import dequantizing
from adapters_core.fusing.fusion import Precision, fuse_layers
from adapters_core.layers.kinds import AdaptedLayer, with_weights
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import is_quantized, weight_shape
from adapters_core.layers.surgery import replace_modules
from adapters_core.layers.targets import module_at, named_modules
from tests.models import (
    QKV,
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

ROWS = [tokens(12, seed=1).tolist(), tokens(7, seed=2).tolist(), [3]]


def _parts(
    folder: Path,
    model: nn.Module,
    precision: Precision,
    kind: str = "lora",
    size: float = 0.05,
    **config: Any,
) -> tuple[AdapterContainer, dict[str, AdaptedLayer], dict[str, nn.Module]]:
    adapter = AdapterContainer.from_directory(make_adapter(folder, model, kind, size=size, **config))
    adapter.load(into=model)
    layers = {path: module for path, module in named_modules(model) if isinstance(module, AdaptedLayer)}
    modules = fuse_layers(layers, precision, "a")[0]
    adapter.unload(from_=model)
    return adapter, layers, modules


def _probabilities(model: nn.Module) -> np.ndarray:
    """(all tokens, vocabulary), float64."""
    logits = np.concatenate([np.array(model(mx.array([row])))[0] for row in ROWS]).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["requantize", "auto"])
def test_agreement_and_divergence_are_those_of_the_two_models(
    tmp_path: Path, precision: Precision, kind: str
) -> None:
    model = tiny_llama(0, 4)
    adapter, layers, modules = _parts(tmp_path / "a", model, precision, kind, size=0.1)
    before = snapshot(model)
    report = compare_activations(model, layers, modules, ROWS)
    assert snapshot(model) == before
    adapter.load(into=model)
    p = _probabilities(model)
    fusion = adapter.fuse(with_=model, precision=precision)
    q = _probabilities(model)
    fusion.undo()
    divergences = (p * np.log(p / q)).sum(axis=-1)
    assert (report.prompts, report.tokens) == (3, 20)
    assert report.agreement == np.mean(p.argmax(axis=-1) == q.argmax(axis=-1))
    assert report.kl_mean == pytest.approx(divergences.mean(), rel=1e-2, abs=1e-6)
    assert report.kl_max == pytest.approx(divergences.max(), rel=1e-2, abs=1e-6)
    assert 0 < report.kl_mean < report.kl_max


def test_errors_of_layers_are_those_of_their_outputs(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    # In the first layer alone, so that its inputs are known: the normed embeddings.
    keys = [f"model.layers.0.{key}" for key in QKV]
    _, layers, modules = _parts(tmp_path / "a", model, "requantize", keys=keys)
    report = compare_activations(model, layers, modules, ROWS)
    errors = {}
    for path in keys:
        lost = size = 0.0
        for row in ROWS:
            x = model.layers[0].input_layernorm(model.model.embed_tokens(mx.array([row])))
            base, exact, fused = (
                np.array(layer(x), dtype=np.float64)
                for layer in (cast(Any, module_at(model, path)), layers[path], modules[path])
            )
            lost += ((fused - exact) ** 2).sum()
            size += ((exact - base) ** 2).sum()
        errors[path] = (lost / size) ** 0.5
    assert report.error_mean == pytest.approx(np.mean(list(errors.values())), rel=1e-3)
    assert report.error_worst == pytest.approx(max(errors.values()), rel=1e-3)
    assert errors[cast(str, report.worst_module)] == max(errors.values())


def test_layers_that_are_kept_differ_in_nothing(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    _, layers, modules = _parts(tmp_path / "a", model, "keep")
    told: list[tuple[int, int]] = []
    report = compare_activations(
        model, layers, modules, ROWS, progress=lambda done, total: told.append((done, total))
    )
    assert (report.error_mean, report.error_worst, report.worst_module) == (0.0, 0.0, None)
    assert report.agreement == 1.0
    assert report.kl_max < 1e-6
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_adapter_without_effect_has_nothing_to_lose(tmp_path: Path) -> None:
    model = tiny_llama(0, 4)
    values = adapter_values()
    tensors = {
        name: mx.zeros_like(tensor) if name.endswith("lora_b") else tensor
        for name, tensor in adapter_tensors(model, values).items()
    }
    adapter = AdapterContainer.from_directory(write_adapter(tmp_path / "a", values, tensors))
    adapter.load(into=model)
    layers = {path: module for path, module in named_modules(model) if isinstance(module, AdaptedLayer)}
    modules = fuse_layers(layers, "dequantize", "a")[0]
    adapter.unload(from_=model)
    report = compare_activations(model, layers, modules, ROWS)
    assert (report.error_mean, report.error_worst, report.worst_module) == (0.0, 0.0, None)
    assert report.agreement == 1.0


def test_the_model_is_put_back_when_a_forward_fails(tmp_path: Path) -> None:
    model = tiny_llama()
    _, layers, modules = _parts(tmp_path / "a", model, "auto")
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)):
        compare_activations(model, layers, modules, [["not a token"]])  # pyright: ignore[reportArgumentType]
    assert snapshot(model) == before


def test_a_tied_embedding_counts_as_the_head_too() -> None:
    model: Any = tiny_llama(0, 4, tie_word_embeddings=True)
    layer = _random_layer(model.model.embed_tokens, (96, 4), (4, 64))
    modules = fuse_layers({"model.embed_tokens": layer}, "requantize", "e")[0]
    report = compare_activations(model, {"model.embed_tokens": layer}, modules, ROWS)
    fused: Any = modules["model.embed_tokens"]
    base = model.model.embed_tokens
    lost = size = 0.0
    model.model.embed_tokens = layer
    for row in ROWS:
        ids = mx.array([row])
        hidden = model.model(ids)
        for call in (lambda one, ids=ids: one(ids), lambda one, hidden=hidden: one.as_linear(hidden)):
            exact, actual, plain = (np.array(call(one), dtype=np.float64) for one in (layer, fused, base))
            lost += ((actual - exact) ** 2).sum()
            size += ((exact - plain) ** 2).sum()
    assert report.error_worst == pytest.approx((lost / size) ** 0.5, rel=1e-3)


def test_experts_are_compared_on_the_rows_that_reach_them() -> None:
    mx.random.seed(0)
    model: Any = mixtral.Model(
        mixtral.ModelArgs(
            model_type="mixtral", vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_experts_per_tok=2, num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip
    nn.quantize(model, group_size=32, bits=4)
    model.eval()
    path = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    layer = _random_layer(model.layers[1].block_sparse_moe.switch_mlp.up_proj, (4, 2, 64), (4, 32, 2))
    found: list[ActivationReport] = []
    for precision in ("requantize", "auto"):
        modules = fuse_layers({path: layer}, precision, "e")[0]
        found.append(compare_activations(model, {path: layer}, modules, ROWS))
    lossy, kept = found
    assert kept.error_worst < 0.1 < lossy.error_worst
    assert kept.kl_mean < lossy.kl_mean


def _random_layer(base: nn.Module, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> AdaptedLayer:
    rng = np.random.default_rng(5)
    a, b = (mx.array(rng.normal(0, 0.3, shape), dtype=mx.float32) for shape in (a_shape, b_shape))
    config = AdapterConfig.from_values(adapter_values(), "test")
    layer = with_weights(base, ModuleWeights(a, b, None, 0.05), config)
    layer.eval()
    return layer


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_stand_ins_compute_what_the_quantised_modules_do(bits: int, tied: bool) -> None:
    model = tiny_llama(0, bits, tie_word_embeddings=tied)
    left = "model.layers.0.self_attn.q_proj"
    found = dequantizing(model, [left])
    quantised = {path for path, module in named_modules(model) if is_quantized(module)}
    assert found.keys() == (quantised - {left} if mx.default_device().type == mx.DeviceType.cpu else set())
    expected = logits(model)
    surgery = replace_modules(model, found)
    assert relative_error(logits(model), expected) < 1e-5
    surgery.undo()
    # What stands in a wrapper's place is the wrapper's business.
    model.layers[1].mlp.up_proj = _random_layer(model.layers[1].mlp.up_proj, (64, 4), (4, 128))  # pyright: ignore[reportAttributeAccessIssue]
    assert not any("layers.1.mlp.up_proj" in path for path in dequantizing(model, []))


class _Masked(nn.Module):
    """A model that rules the last tokens of its vocabulary out, as padding, by -inf."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def __call__(self, inputs: mx.array) -> mx.array:
        logits = self.inner(inputs)
        return mx.where(mx.arange(logits.shape[-1]) < 80, logits, -mx.inf)


def test_tokens_that_are_ruled_out_add_nothing_to_the_divergence(tmp_path: Path) -> None:
    model = _Masked(tiny_llama(0, 4))
    keys = [f"inner.model.layers.0.{key}" for key in QKV]
    adapter = AdapterContainer.from_weights(
        {path: _random_weights(module_at(model, path)) for path in keys}, "a"
    )
    layers = {
        path: with_weights(module_at(model, path), one, AdapterConfig())
        for path, one in adapter.check(model).items()
    }
    modules = fuse_layers(layers, "requantize", "a")[0]
    report = compare_activations(model, layers, modules, ROWS)
    assert np.isfinite([report.kl_mean, report.kl_max, report.error_mean]).all()
    assert report.kl_max > 0


def _random_weights(module: nn.Module) -> ModuleWeights:
    out_size, in_size = weight_shape(module)
    a = mx.random.normal((in_size, 4), key=mx.random.key(1)) * 0.1
    return ModuleWeights(a, mx.random.normal((4, out_size), key=mx.random.key(2)) * 0.1, None, 1.0)


@pytest.mark.parametrize("precision", ["auto", "keep"])
def test_outputs_that_are_not_finite_are_refused_and_the_model_stays(
    precision: Precision, tmp_path: Path
) -> None:
    model = tiny_llama()
    # The weights are finite, and so is their norm; the squares of what they make are not.
    _, layers, modules = _parts(tmp_path / "a", model, precision, size=3e8, scale=1.0, keys=["lm_head"])
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError, match=r"'huge'.*lm_head: expected finite outputs") as found:
        compare_activations(model, layers, modules, ROWS, source="huge")
    assert len(found.value.problems) <= 3
    assert snapshot(model) == before


@pytest.mark.parametrize("precision", ["auto", "keep", "dequantize"])
def test_a_bias_that_leaves_the_bases_range_is_refused(precision: Precision) -> None:
    model = tiny_llama()
    model.set_dtype(mx.float16)
    path = "model.layers.1.self_attn.q_proj"
    one = _random_weights(module_at(model, path))
    weights = ModuleWeights(
        one.lora_a, one.lora_b, None, 1e3 if precision != "keep" else 1e38, mx.full((64,), 1e3)
    )
    layers = {path: with_weights(module_at(model, path), weights, AdapterConfig())}
    with pytest.raises(InvalidAdapterError, match="expected finite weights once fused"):
        fuse_layers(layers, precision, "a")

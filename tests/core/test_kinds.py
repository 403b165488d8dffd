"""Embeddings and switch layers with one adapter: as mlx-lm's, or as over the dense weight where it errs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding as TheirDoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding as TheirLoRAEmbedding
from mlx_lm.tuner.lora import LoRASwitchLinear as TheirLoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import UnsupportedModelError
from adapters_core.layers.builders import dense_like, quantized_like
from adapters_core.layers.kinds import (
    DoRAEmbedding,
    DoRALinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    ModuleWeights,
)
from adapters_core.layers.modules import ModuleKind, dense_weight, factor_shapes, is_quantized, weight_shape
from tests.mixed.architectures import tiny
from tests.mixed.resident import paths_of
from tests.models import adapter_values, make_adapter, relative_error, snapshot, tokens

TOKENS, DIMS, RANK, EXPERTS = 40, 64, 3, 4
MODES = [(2, "affine"), (3, "affine"), (4, "affine"), (5, "affine"), (6, "affine"), (8, "affine")]
MODES += [(4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]
GROUP_SIZES = {"nvfp4": 16}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(11)


def quantised(module: Any, bits: int | None, mode: str = "affine") -> Any:
    """`module`, or a quantised one like it with a bias in float32, so that it computes in float32."""
    return module if bits is None else module.to_quantized(GROUP_SIZES.get(mode, 32), bits, mode=mode)


def weights_for(module: nn.Module, *, dora: bool = False, seed: int = 1) -> ModuleWeights:
    rng = np.random.default_rng(seed)
    drawn = {
        leaf: mx.array(rng.normal(0, 0.3, shape), dtype=mx.float32)
        for leaf, shape in factor_shapes(module, RANK, dora).items()
    }
    magnitude = mx.abs(drawn["m"]) + 0.5 if dora else None
    return ModuleWeights(drawn["lora_a"], drawn["lora_b"], magnitude, 0.7)


def theirs(kind: Any, base: nn.Module, weights: ModuleWeights) -> Any:
    layer = kind.from_base(base, r=RANK, scale=weights.scale)
    layer.lora_a, layer.lora_b = weights.lora_a, weights.lora_b
    if weights.magnitude is not None:
        layer.m = weights.magnitude
    return layer


def random(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5))


def close(found: mx.array, expected: mx.array, bound: float = 1e-5) -> bool:
    assert found.shape == expected.shape
    pair = (np.array(one.astype(mx.float32)) for one in (found, expected))
    return relative_error(*pair) < bound


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_lora_on_an_embedding_is_mlx_lms(bits: int | None) -> None:
    base = quantised(nn.Embedding(TOKENS, DIMS), bits)
    weights = weights_for(base)
    ours, their = LoRAEmbedding(base, weights, 0.0), theirs(TheirLoRAEmbedding, base, weights)
    x, ids = random(2, 5, DIMS), tokens(2, 5) % TOKENS
    assert close(ours(ids), their(ids))
    assert close(ours.as_linear(x), their.as_linear(x))
    assert close(ours.fused_weight()[ids], ours(ids))
    fused = ours.fused()
    assert type(fused) is type(base)
    assert close(dense_weight(fused), dense_weight(their.fuse()), 1e-3)
    assert {name for name, _ in tree_flatten(ours.parameters())} == {
        name for name, _ in tree_flatten(their.parameters())
    }


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize(("bits", "mode"), [(None, "affine"), *MODES])
def test_a_dora_on_an_embedding_is_mlx_lms_over_the_dense_weight(
    bits: int | None, mode: str, is_settled: bool
) -> None:
    base = quantised(nn.Embedding(TOKENS, DIMS), bits, mode)
    dense = nn.Embedding(TOKENS, DIMS)
    dense.weight = dense_weight(base).astype(mx.float32)
    weights = weights_for(base, dora=True)
    ours, their = DoRAEmbedding(base, weights, 0.0), theirs(TheirDoRAEmbedding, dense, weights)
    ours.eval()
    if is_settled:
        ours.settle()
    x, ids = random(2, 5, DIMS), tokens(2, 5) % TOKENS
    bound = 1e-5 if dense_weight(base).dtype == mx.float32 else 1e-2
    assert close(ours(ids), their(ids), bound)
    assert close(ours.as_linear(x), their.as_linear(x), bound)
    assert close(ours.fused_weight(), their.fuse().weight, 1e-5)
    fresh = DoRAEmbedding(base, ModuleWeights(weights.lora_a, weights.lora_b * 0, None, 1.0), 0.0)
    assert close(fresh(ids), base(ids), bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "mode"), [(None, "affine"), *MODES])
def test_a_lora_on_a_switch_layer_is_mlx_lms(bits: int | None, mode: str, bias: bool) -> None:
    base = quantised(SwitchLinear(DIMS, 32, EXPERTS, bias=bias), bits, mode)
    if bias:
        base.bias = random(EXPERTS, 32)
    weights = weights_for(base)
    ours, their = LoRASwitchLinear(base, weights, 0.0), theirs(TheirLoRASwitchLinear, base, weights)
    x, indices = random(2, 5, 1, 1, DIMS), (tokens(2, 5, 2) % EXPERTS).astype(mx.uint32)
    flat, in_order = random(8, 1, DIMS), mx.array([0, 0, 1, 1, 1, 2, 3, 3], dtype=mx.uint32)
    calls: list[Any] = [(x, indices), (flat, in_order, True)]
    for arguments in calls:
        assert close(ours(*arguments), their(*arguments))
    assert weight_shape(base) == dense_weight(base).shape == (EXPERTS, 32, DIMS)
    dense = dense_like(base, ours.fused_weight())
    assert close(dense(flat.astype(mx.float32), in_order), ours(flat, in_order), 1e-2)
    fused: Any = ours.fused()
    assert type(fused) is type(base)
    assert ("bias" in fused) == bias
    expected: Any = their.fuse()
    if bits is not None:
        assert [getattr(fused, name) for name in ("bits", "mode")] == [bits, mode]
        assert fused.weight.shape == expected.weight.shape
    assert {name for name, _ in tree_flatten(ours.parameters())} == {
        name for name, _ in tree_flatten(their.parameters())
    }


def test_experts_with_global_scales_keep_them() -> None:
    # MLX computes with such layers on a GPU alone; their weights can be read and made anywhere.
    dense = SwitchLinear(DIMS, 32, EXPERTS, bias=False)
    dense.weight = dense.weight * mx.array([1.0, 0.01, 30.0, 5.0])[:, None, None]
    base = dense.to_quantized(16, 4, mode="nvfp4", global_scale=True)
    assert close(dense_weight(base), dense.weight, 0.15)
    fused: Any = LoRASwitchLinear(base, weights_for(base), 0.0).fused()
    assert fused.global_scale.shape == (EXPERTS,)
    again = quantized_like(base, dense_weight(base))
    assert close(dense_weight(again), dense_weight(base), 0.05)


@pytest.mark.parametrize(("bits", "mode"), [(None, "affine"), *MODES])
@pytest.mark.parametrize("make", [lambda: nn.Linear(DIMS, 32), lambda: nn.Embedding(TOKENS, DIMS)])
def test_builders_make_the_bases_kind_and_leave_the_random_state(
    make: Any, bits: int | None, mode: str
) -> None:
    base = quantised(make(), bits, mode)
    base.freeze()
    state: Any = mx.random.state
    before = state[0].tolist()
    weight = dense_weight(base)
    assert weight.shape == weight_shape(base)
    dense = dense_like(base, weight.astype(mx.float32))
    assert not is_quantized(dense)
    assert dense._no_grad == base._no_grad
    assert mx.array_equal(dense_weight(dense).astype(mx.float32), weight.astype(mx.float32)).item()
    if bits is not None:
        again = quantized_like(base, weight)
        assert type(again) is type(base)
        assert str(again) == str(base)
        # Quantising what was quantised need not give the same: the range of a group is found anew.
        assert close(dense_weight(again), weight, 1.0 / (2**bits - 1))
    assert state[0].tolist() == before


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_bias_of_the_adapters_own_adds_to_the_update_before_its_scale(
    bits: int | None, has_bias: bool
) -> None:
    base = quantised(nn.Linear(DIMS, 32, bias=has_bias), bits)
    plain = weights_for(base)
    weights = ModuleWeights(plain.lora_a, plain.lora_b, None, plain.scale, random(32))
    layer, x = LoRALinear(base, weights, 0.0), random(2, 5, DIMS)
    expected = base(x) + plain.scale * (x @ plain.lora_a @ plain.lora_b + random(32))
    assert close(layer(x), expected)
    assert layer.weights == weights
    fused: Any = layer.fused()
    assert close(fused(x) - x @ dense_weight(fused).T, mx.broadcast_to(fused.bias, expected.shape), 1e-4)
    added = fused.bias - base.bias if has_bias else fused.bias
    assert close(added, plain.scale * random(32), 1e-4)
    if bits is None:
        assert close(fused(x), expected)
    with pytest.raises(ValueError, match="DoRA has no bias"):
        DoRALinear(base, weights, 0.0)


def test_a_tied_head_that_reads_the_weight_itself_is_refused() -> None:
    base = nn.Embedding(TOKENS, DIMS)
    for layer in (
        LoRAEmbedding(base, weights_for(base), 0.0),
        DoRAEmbedding(base, weights_for(base, dora=True), 0.0),
    ):
        with pytest.raises(UnsupportedModelError, match="reads the weight"):
            _ = layer.weight


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fused_embeddings_and_experts_compute_what_the_adapted_ones_did(
    kind: str, bits: int | None, tmp_path: Path
) -> None:
    model = tiny("mixtral, tied head", bits)
    keys = paths_of(model, ModuleKind.EMBEDDING)
    if kind == "lora":
        keys += paths_of(model, ModuleKind.SWITCH)
    container = AdapterContainer.from_directory(
        make_adapter(tmp_path / "a", model, kind, keys=keys, size=0.1)
    )
    before = snapshot(model)
    container.load(into=model)
    adapted = np.array(model(tokens(2, 9)))
    container.unload(from_=model)
    for precision, bound in (("dequantize", 1e-5), ("keep", 1e-6), ("auto", 0.05), ("requantize", 0.5)):
        fusion = container.fuse(with_=model, precision=precision)  # pyright: ignore[reportArgumentType]
        assert fusion.report.modules == len(keys)
        assert relative_error(np.array(model(tokens(2, 9))), adapted) < bound
        fusion.undo()
        assert snapshot(model) == before


@pytest.mark.parametrize("kind", [LoRAEmbedding, DoRAEmbedding])
def test_an_adapter_for_look_ups_alone_leaves_the_head(kind: Any) -> None:
    base = nn.Embedding(TOKENS, DIMS)
    weights = replace(weights_for(base, dora=kind is DoRAEmbedding), lookup_only=True)
    layer, x = kind(base, weights, 0.0), random(2, 5, DIMS)
    assert mx.array_equal(layer.as_linear(x), base.as_linear(x)).item()
    assert not close(layer(tokens(2, 5) % TOKENS), base(tokens(2, 5) % TOKENS), 1e-2)


MOE_KEYS = ["mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj", "self_attn.q_proj", "model.embed_tokens"]


@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_and_training_steps_are_mlx_lms(bits: int | None, tmp_path: Path) -> None:
    def model() -> Any:
        return tiny("qwen3_moe", bits)

    folder = make_adapter(tmp_path / "a", model(), keys=MOE_KEYS, size=0.1)
    ours, their = model(), load_adapters(model(), str(folder))
    AdapterContainer.from_directory(folder).load(into=ours)
    gradients = []
    for one in (ours, their):
        one.freeze()
        one.unfreeze(keys=["lora_a", "lora_b"])
        one.train()

        def loss(one: nn.Module) -> mx.array:
            return nn.losses.cross_entropy(one(tokens(2, 8)), tokens(2, 8, seed=8), reduction="mean")

        gradients.append(dict(tree_flatten(nn.value_and_grad(one, loss)(one)[1])))
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * (3 * 2 + 1)
    for name, gradient in gradients[0].items():
        assert relative_error(np.array(gradient), np.array(gradients[1][name])) < 1e-4


def test_a_new_adapter_begins_as_mlx_lms_and_changes_nothing(tmp_path: Path) -> None:
    ours, their = tiny("qwen3_moe"), tiny("qwen3_moe")
    before, base = snapshot(ours), np.array(ours(tokens(2, 8)))
    config = AdapterConfig.from_values(adapter_values(keys=MOE_KEYS), "test")
    container = AdapterContainer.from_model(ours, config)
    their.freeze()
    linear_to_lora_layers(their, -1, adapter_values(keys=MOE_KEYS)["lora_parameters"])
    expected = dict(tree_flatten(their.trainable_parameters()))
    assert {name: one.shape for name, one in container.parameters.items()} == {
        name: one.shape for name, one in expected.items()
    }
    for name, one in container.parameters.items():
        bound = float(mx.abs(expected[name]).max())
        assert float(mx.abs(one).max()) == pytest.approx(bound, rel=0.2)
    assert relative_error(np.array(ours(tokens(2, 8))), base) < 1e-6
    container.save(tmp_path / "new")
    container.unload(from_=ours)
    again = AdapterContainer.from_directory(tmp_path / "new")
    assert again.digest == container.digest
    ours.eval()
    ours.unfreeze()
    assert snapshot(ours) == before

"""DoRA of an embedding as PEFT has it: one magnitude for each feature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError, UnsupportedModelError
from adapters_core.layers.embedding import FeatureDoRAEmbedding
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import dense_weight
from adapters_core.mixed.residents import make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from tests.models import snapshot
from tests.peft import fixtures

EMBEDDING, QUERY = "model.embed_tokens", "model.layers.0.self_attn.q_proj"


def _weights() -> ModuleWeights:
    # As many tokens as features: whatever is scaled along the wrong side fits.
    rng = np.random.default_rng(2)
    a, b, m = (mx.array(rng.normal(0, 0.3, shape), mx.float32) for shape in ((32, 3), (3, 32), (32,)))
    return ModuleWeights(a, b, mx.abs(m) + 0.5, 1.5, by_feature=True)


def _by_hand(base: nn.Module, weights: ModuleWeights) -> np.ndarray:
    """(W + s·A B) with each column scaled to its magnitude, float64."""
    a, b, m = (np.array(array, np.float64) for array in (weights.lora_a, weights.lora_b, weights.magnitude))
    whole = np.array(dense_weight(base), np.float64) + weights.scale * a @ b
    return whole * (m / np.linalg.norm(whole, axis=0))


@pytest.mark.parametrize("is_quantised", [False, True])
def test_it_scales_columns_as_a_look_up_as_a_head_and_fused(is_quantised: bool) -> None:
    mx.random.seed(3)
    base: Any = nn.Embedding(32, 32)
    base = base.to_quantized(32, 8) if is_quantised else base
    weights = _weights()
    expected = _by_hand(base, weights)
    layer = FeatureDoRAEmbedding(base, weights, 0.0)
    layer.settle()
    layer.eval()
    x = mx.random.normal((2, 5, 32))
    np.testing.assert_allclose(np.array(layer(mx.arange(32))), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(layer.as_linear(x)), np.array(x) @ expected.T, atol=1e-4)
    np.testing.assert_allclose(np.array(layer.fused_weight()), expected, atol=1e-5)
    apart = FeatureDoRAEmbedding(base, replace(weights, lookup_only=True), 0.0)
    np.testing.assert_array_equal(np.array(apart.as_linear(x)), np.array(base.as_linear(x)))
    assert layer.weights.by_feature
    assert layer.reverted() is base


def test_without_magnitudes_it_begins_as_the_base() -> None:
    mx.random.seed(3)
    base = nn.Embedding(32, 8)
    weights = ModuleWeights(mx.ones((32, 2)), mx.zeros((2, 8)), None, 2.0, by_feature=True)
    layer = FeatureDoRAEmbedding(base, weights, 0.0)
    np.testing.assert_allclose(np.array(layer(mx.arange(32))), np.array(base.weight), atol=1e-6)


def test_what_training_changes_is_kept() -> None:
    model = fixtures.model("llama")
    before = snapshot(model)
    container = AdapterContainer.from_directory(fixtures.adapter("embedding-dora"))
    digest = container.digest
    container.load(into=model)
    assert container.digest == digest
    layer = dict(model.named_modules())[EMBEDDING]
    layer.m = layer.m * 2
    changed = np.array(model(fixtures.tokens()))
    assert container.digest != digest
    container.unload(from_=model)
    assert snapshot(model) == before
    assert container.check(model)[EMBEDDING].by_feature
    container.load(into=model)
    np.testing.assert_allclose(np.array(model(fixtures.tokens())), changed, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_mixed_rows_of_a_quantised_embedding_equal_one_at_a_time(bits: int) -> None:
    model = fixtures.model("qwen3")
    nn.quantize(model, 32, bits, class_predicate=lambda path, _: path == EMBEDDING)
    container = AdapterContainer.from_directory(fixtures.adapter("lookup-dora"))
    tokens = fixtures.tokens()
    plain = np.array(model(tokens))
    container.load(into=model)
    alone = np.array(model(tokens))
    container.unload(from_=model)
    routing = Routing()
    bank, routed = AdapterBank(model, routing), RoutedModel(model, routing)
    resident = bank.add(container)
    rows = [make_row([(resident, 1.0)]), make_row([]), make_row([(resident, 1.0)])]
    merged = [
        entries[0].merge(list(entries))
        for entries in zip(*(routed.new_cache(row) for row in rows), strict=True)
    ]
    mixed = np.array(routed(tokens, cache=merged))
    for at, expected in enumerate((alone, plain, alone)):
        np.testing.assert_allclose(mixed[at], expected[at], atol=1e-4)
    assert np.abs(alone[0] - plain[0]).max() > 1e-2


def test_a_tied_head_that_it_is_to_change_is_refused_in_mixed_rows() -> None:
    model = fixtures.model("qwen3")
    found = AdapterContainer.from_directory(fixtures.adapter("lookup-dora")).check(model)
    both = {path: replace(one, lookup_only=False) for path, one in found.items()}
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens: a DoRA by feature"):
        AdapterBank(model, Routing()).add(AdapterContainer.from_weights(both, "both"))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("path", "change", "expected"),
    [
        (
            EMBEDDING,
            {"bias": mx.ones(32)},
            "a bias of the adapter's own is for linear layers, got a Embedding",
        ),
        (QUERY, {"bias": mx.ones(32), "magnitude": mx.ones(32)}, "a bias and magnitudes"),
        (QUERY, {"lookup_only": True}, r"look-ups alone \(lookup_only\) are for embeddings, got a Linear"),
        (
            QUERY,
            {"by_feature": True, "magnitude": mx.ones(32)},
            "by feature are for embeddings, got a Linear",
        ),
    ],
)
def test_what_a_module_cannot_follow_is_refused(path: str, change: dict[str, Any], expected: str) -> None:
    rows = 64 if path == EMBEDDING else 32
    weights = replace(ModuleWeights(mx.ones((rows, 2)), mx.ones((2, 32)), None, 1.0), **change)
    container = AdapterContainer.from_weights({path: weights}, "it")
    with pytest.raises(InvalidAdapterError, match=expected) as refused:
        container.check(fixtures.model("llama"))
    assert len(refused.value.problems) == 1

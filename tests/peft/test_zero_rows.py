"""Rows of zeros in the base, as a padded vocabulary has them, beside magnitudes: finite, and as without."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.layers.embedding import FeatureDoRAEmbedding
from adapters_core.layers.linear import DoRALinear
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.mixed.residents import make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from tests.models import snapshot
from tests.peft import fixtures

ZEROS = [4, 61, 62]  # none of the tokens of the fixtures


def _padded(name: str) -> nn.Module:
    model: Any = fixtures.model(name)
    for module in (model.model.embed_tokens, getattr(model, "lm_head", None)):
        if module is not None:
            weight = mx.array(module.weight)
            weight[mx.array(ZEROS)] = 0
            module.weight = weight
    return model


def _logits(model: nn.Module, tokens: mx.array) -> np.ndarray:
    return np.array(model(tokens).astype(mx.float32))


@pytest.mark.parametrize("name", ["tokens-dora", "tokens-dora-tied", "saved-dora"])
def test_zero_rows_stay_zero_loaded_mixed_and_fused(name: str) -> None:
    model = _padded(fixtures.base_of(name))
    before = snapshot(model)
    container = AdapterContainer.from_directory(fixtures.adapter(name))
    container.load(into=model)
    alone = _logits(model, fixtures.tokens())
    # Rows of the vocabulary that are zeros change nothing of the other logits.
    rest = np.setdiff1d(np.arange(64), ZEROS)
    np.testing.assert_allclose(alone[..., rest], fixtures.expected(name)[..., rest], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(alone[..., ZEROS], 0)
    padded = mx.array([[5, *ZEROS, 9, 1]])
    looked_up = _logits(model, padded)
    assert np.isfinite(looked_up).all()
    container.unload(from_=model)
    assert snapshot(model) == before
    routing = Routing()
    bank, routed = AdapterBank(model, routing), RoutedModel(model, routing)
    row = make_row([(bank.add(container), 1.0)])
    for tokens, wanted in ((fixtures.tokens()[:1], alone[:1]), (padded, looked_up)):
        mixed = np.array(routed(tokens, cache=routed.new_cache(row)))
        np.testing.assert_allclose(mixed, wanted, atol=1e-4, rtol=0)
    model = _padded(fixtures.base_of(name))
    container.fuse(with_=model, precision="keep" if name == "saved-dora" else "auto")
    np.testing.assert_allclose(_logits(model, padded), looked_up, atol=1e-4, rtol=0)


def test_a_linear_layer_with_a_zero_row_has_a_zero_output() -> None:
    base = nn.Linear(4, 3, bias=False)
    base.weight = mx.array([[1.0, 2, 3, 4], [0, 0, 0, 0], [4, 3, 2, 1]])
    layer = DoRALinear(base, ModuleWeights(mx.ones((4, 1)), mx.zeros((1, 3)), None, 1.0), 0.0)
    np.testing.assert_allclose(np.array(layer(mx.eye(4))), np.array(base.weight.T), atol=1e-6)
    np.testing.assert_allclose(np.array(layer.fused_weight()), np.array(base.weight), atol=1e-6)


def test_an_embedding_with_a_zero_feature_keeps_it() -> None:
    base = nn.Embedding(5, 3)
    base.weight = mx.array(np.array(base.weight) * [1.0, 0.0, 1.0]).astype(mx.float32)
    weights = ModuleWeights(mx.ones((5, 1)), mx.zeros((1, 3)), None, 1.0, by_feature=True)
    layer = FeatureDoRAEmbedding(base, weights, 0.0)
    np.testing.assert_allclose(np.array(layer(mx.arange(5))), np.array(base.weight), atol=1e-6)

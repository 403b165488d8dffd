"""A blend beside its parts in one bank: one adapter computes what the parts' weights compute per row."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.blending.blend import BlendOptions, BlendPart, blend
from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from tests.mixed.architectures import tiny
from tests.models import make_adapter, tiny_llama, tokens

WEIGHTS = {"a": 0.7, "b": -1.2, "c": 1.5}


def blended_and_weighted(model: nn.Module, root: Path, weights: dict[str, float]) -> tuple[np.ndarray, ...]:
    """Logits of the linear blend of the adapters under `root`, of their weights in a row, and of the base."""
    routing = Routing()
    bank = AdapterBank(model, routing)
    routed = RoutedModel(model, routing)
    parts = {name: AdapterContainer.from_directory(root / name) for name in weights}
    made = blend(
        [BlendPart(name, weight, parts[name].check(model)) for name, weight in weights.items()],
        BlendOptions(),
    )
    whole = bank.add(AdapterContainer.from_weights(made.modules, "blend"))
    rows = [
        make_row([(whole, 1.0)]),
        make_row((bank.add(parts[name]), weight) for name, weight in weights.items()),
        (),
    ]
    return tuple(np.array(routed(tokens(1, 9), routed.new_cache(row)).astype(mx.float32)) for row in rows)


def assert_equal(blended: np.ndarray, weighted: np.ndarray, base: np.ndarray) -> None:
    """Within 1e-5 of the largest, and not because the adapters do nothing."""
    assert np.abs(weighted - base).max() > 0.01 * np.abs(base).max()
    np.testing.assert_allclose(blended, weighted, atol=1e-5 * np.abs(weighted).max(), rtol=0)


@pytest.mark.parametrize("quantize_bits", [None, 4])
def test_logits_are_those_of_the_weights(tmp_path: Path, quantize_bits: int | None) -> None:
    model = tiny_llama(quantize_bits=quantize_bits)
    make_adapter(tmp_path / "a", model, seed=1)
    make_adapter(tmp_path / "b", model, seed=2, rank=6, scale=0.5)
    make_adapter(tmp_path / "c", model, seed=3, num_layers=1, keys=["mlp.down_proj", "self_attn.q_proj"])
    assert_equal(*blended_and_weighted(model, tmp_path, WEIGHTS))


def test_embeddings_and_experts_are_blended_too(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    experts = ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"]
    make_adapter(tmp_path / "a", model, seed=1, rank=2, keys=[*experts, "self_attn.q_proj"])
    make_adapter(tmp_path / "b", model, seed=2, rank=3, keys=["model.embed_tokens", *experts[1:]])
    assert_equal(*blended_and_weighted(model, tmp_path, {"a": 0.7, "b": -1.2}))

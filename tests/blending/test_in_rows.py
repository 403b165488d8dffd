"""A blend beside its parts in one bank: one adapter computes what the parts' weights compute per row."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.blending import BlendOptions, BlendPart, blend
from adapters_core.container import AdapterContainer
from adapters_core.routing import RoutedModel, Routing, RowAdapters, make_row
from tests.models import make_adapter, tiny_llama, tokens

WEIGHTS = {"a": 0.7, "b": -1.2, "c": 1.5}


@pytest.mark.parametrize("quantize_bits", [None, 4])
def test_logits_are_those_of_the_weights(tmp_path: Path, quantize_bits: int | None) -> None:
    model = tiny_llama(quantize_bits=quantize_bits)
    make_adapter(tmp_path / "a", model, seed=1)
    make_adapter(tmp_path / "b", model, seed=2, rank=6, scale=0.5)
    make_adapter(tmp_path / "c", model, seed=3, num_layers=1, keys=["mlp.down_proj", "self_attn.q_proj"])
    routing = Routing()
    bank = AdapterBank(model, routing)
    parts = {name: AdapterContainer.from_directory(tmp_path / name) for name in WEIGHTS}
    made = blend(
        [BlendPart(name, weight, parts[name].check(model)) for name, weight in WEIGHTS.items()],
        BlendOptions(),
    )
    row = make_row((bank.add(parts[name]), weight) for name, weight in WEIGHTS.items())
    blended = make_row([(bank.add(AdapterContainer.from_weights(made.modules, "blend")), 1.0)])
    routed = RoutedModel(model, routing)

    def logits(of: RowAdapters) -> np.ndarray:
        return np.array(routed(tokens(1, 9), routed.new_cache(of)).astype(mx.float32))

    expected = logits(row)
    assert np.abs(expected - logits(())).max() > 0.1
    np.testing.assert_allclose(logits(blended), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)

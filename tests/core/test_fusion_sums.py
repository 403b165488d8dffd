"""Several adapters as one: the sum of their changes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError
from adapters_core.fusing.fusion import fuse_layers
from adapters_core.fusing.sums import summed, summed_layers
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import dense_weight
from adapters_core.layers.targets import module_at
from tests.models import make_adapter, relative_error, tiny_llama


def _read(folder: Path, seed: int, **config: object) -> AdapterContainer:
    kind = str(config.pop("kind", "lora"))
    return AdapterContainer.from_directory(make_adapter(folder, tiny_llama(), kind, seed=seed, **config))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bits", [None, 4])
def test_a_sum_has_the_weighted_changes_of_all(tmp_path: Path, bits: int | None) -> None:
    model = tiny_llama(0, bits)
    one = _read(tmp_path / "a", 1, rank=4, scale=2.0)
    two = _read(tmp_path / "b", 2, rank=6, scale=0.5, keys=["self_attn.q_proj", "mlp.up_proj"])
    layers = summed_layers(model, [(one, 0.7), (two, -1.5)])
    assert layers.keys() == one.check(model).keys() | two.check(model).keys()
    modules = fuse_layers(layers, "dequantize", "sum")[0]
    for path in layers:
        expected = np.array(dense_weight(module_at(model, path)), dtype=np.float64)
        for adapter, weight in ((one, 0.7), (two, -1.5)):
            found = adapter.check(model).get(path)
            if found is not None:
                delta = np.array(found.lora_a, dtype=np.float64) @ np.array(found.lora_b, dtype=np.float64)
                expected = expected + weight * found.scale * delta.T
        assert relative_error(np.array(dense_weight(modules[path])), expected) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_one_adapter_at_weight_1_is_itself(tmp_path: Path, kind: str) -> None:
    adapter = _read(tmp_path / "a", 1, kind=kind)
    weights = adapter.check(tiny_llama())
    assert summed([(weights, 1.0)]) == weights


def test_a_dora_is_no_summand(tmp_path: Path) -> None:
    model = tiny_llama()
    lora, dora = _read(tmp_path / "a", 1), _read(tmp_path / "d", 2, kind="dora")
    for terms in ([(dora, 0.5)], [(dora, 1.0), (lora, 1.0)], [(lora, 1.0), (dora, 1.0)]):
        with pytest.raises(BlendError, match="DoRA"):
            summed_layers(model, terms)


def test_experts_and_biases_are_summed_too() -> None:
    rng = np.random.default_rng(0)

    def weights(rank: int, scale: float, has_bias: bool) -> ModuleWeights:
        a, b = rng.normal(size=(3, rank, 8)), rng.normal(size=(3, 5, rank))
        bias = mx.array(rng.normal(size=5)) if has_bias else None
        return ModuleWeights(mx.array(a), mx.array(b), None, scale, bias)

    one, two, three = weights(2, 2.0, True), weights(3, 0.5, False), weights(1, 1.0, True)
    result = summed([({"e": one}, 1.0), ({"e": two}, 2.0), ({"e": three}, -1.0)])["e"]
    terms = ((one, 2.0), (two, 1.0), (three, -1.0))
    expected = sum(np.array(w.lora_b) @ np.array(w.lora_a) * factor for w, factor in terms)
    np.testing.assert_allclose(np.array(result.lora_b @ result.lora_a), expected, atol=1e-5)
    assert one.bias is not None
    assert three.bias is not None
    assert result.bias is not None
    np.testing.assert_allclose(
        np.array(result.bias), 2 * np.array(one.bias) - np.array(three.bias), atol=1e-5
    )
    assert result.scale == 1.0

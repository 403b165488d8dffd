"""An embedding that PEFT adapts beside a head that is tied to it and stays the base's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.blending.blend import BlendOptions, BlendPart, blend
from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError, InvalidAdapterError, InvalidBlendError
from adapters_core.formats.mlx_writing import mlx_files
from adapters_core.formats.peft.writing import peft_files
from adapters_core.fusing.fusion import Precision
from adapters_core.fusing.sums import summed, summed_layers
from adapters_core.layers.module_weights import ModuleWeights
from tests.models import snapshot
from tests.peft import fixtures

EMBEDDING = "model.embed_tokens"


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(fixtures.tokens()).astype(mx.float32))


def _container() -> AdapterContainer:
    return AdapterContainer.from_directory(fixtures.adapter("lookup-only"))


def test_it_is_told_apart_from_an_adapter_of_both() -> None:
    model = fixtures.model("qwen3")
    weights = _container().check(model)
    assert [path for path, one in weights.items() if one.lookup_only] == [EMBEDDING]
    tied = AdapterContainer.from_directory(fixtures.adapter("tied")).check(model)
    assert not any(one.lookup_only for one in tied.values())
    both = [AdapterContainer.from_weights(found, "x") for found in (weights, _all_tied(weights))]
    assert both[0].digest != both[1].digest
    untied = AdapterContainer.from_directory(fixtures.adapter("embedding")).check(fixtures.model("llama"))
    assert not any(one.lookup_only for one in untied.values())


def _all_tied(weights: dict[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    return {path: ModuleWeights(one.lora_a, one.lora_b, None, one.scale) for path, one in weights.items()}


def test_one_weight_cannot_hold_it_and_factors_beside_it_can() -> None:
    model = fixtures.model("qwen3")
    container, before = _container(), snapshot(model)
    merging: tuple[Precision, ...] = ("auto", "requantize", "dequantize")
    for precision in merging:
        with pytest.raises(InvalidAdapterError, match=r"model\.embed_tokens: the look-up is adapted"):
            container.fuse(with_=model, precision=precision)
        assert snapshot(model) == before
    fusion = container.fuse(with_=model, precision="keep")
    np.testing.assert_allclose(_logits(model), fixtures.expected("lookup-only"), atol=1e-4, rtol=0)
    fusion.undo()
    assert snapshot(model) == before


def test_sums_refuse_it_and_blends_refuse_it_beside_others() -> None:
    weights = _container().check(fixtures.model("qwen3"))
    with pytest.raises(BlendError, match=r"embed_tokens is adapted for look-ups alone, .* at weight 1"):
        summed([(weights, 0.5)])
    others = {path: replace(one, lookup_only=False) for path, one in weights.items()}
    with pytest.raises(InvalidBlendError, match="some of the adapters change the head"):
        blend([BlendPart("it", 1.0, weights), BlendPart("other", 1.0, others)], BlendOptions())


def test_pefts_format_can_say_it_and_mlx_lms_cannot(tmp_path: Path) -> None:
    model = fixtures.model("qwen3")
    weights = _container().check(model)
    with pytest.raises(InvalidAdapterError, match="cannot say"):
        mlx_files(weights, "it")
    peft_files(weights, "it", {EMBEDDING}).write(tmp_path / "a")
    again = AdapterContainer.from_directory(tmp_path / "a")
    again.load(into=model)
    np.testing.assert_allclose(_logits(model), fixtures.expected("lookup-only"), atol=1e-4, rtol=0)


def test_a_sum_of_folders_in_pefts_format_is_made() -> None:
    model = fixtures.model("llama")
    terms = [(AdapterContainer.from_directory(fixtures.adapter(name)), 0.5) for name in ("plain", "rslora")]
    layers = summed_layers(model, terms)
    assert layers["model.layers.0.self_attn.q_proj"].weights.rank == 8
    assert layers["model.layers.0.mlp.up_proj"].weights.rank == 4

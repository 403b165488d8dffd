"""Folders written in PEFT's format come back the same; what it cannot say is refused.

That PEFT itself computes the same with them is what `check_written` is for.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.peft.writing import peft_files
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from adapters_core.layers.module_weights import ModuleWeights
from tests.peft import fixtures

EMBEDDING = "model.embed_tokens"
BLOCK = "model.layers.1.mlp.switch_mlp"
GATE, UP, DOWN = (f"{BLOCK}.{name}_proj" for name in ("gate", "up", "down"))
Weights = dict[str, ModuleWeights]


def _read(folder: Path, model: nn.Module) -> Weights:
    return AdapterContainer.from_directory(folder).check(model)


def _assert_same(left: Weights, right: Weights, tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for path, one in left.items():
        other = right[path]
        assert (one.scale, one.lookup_only, one.by_feature) == (
            other.scale,
            other.lookup_only,
            other.by_feature,
        )
        for name in ("lora_a", "lora_b", "magnitude", "bias"):
            mine, its = getattr(one, name), getattr(other, name)
            if name == "bias" and its is None and mine is not None:
                its = mx.zeros_like(mine)  # PEFT has a bias in all modules or in none
            assert (mine is None) == (its is None), (path, name)
            if mine is not None and its is not None:
                assert mine.dtype == its.dtype
                pair = np.array(mine), np.array(its)
                np.testing.assert_allclose(*pair, rtol=tolerance, atol=0, err_msg=f"{path} {name}")


def _is_by_token(module: ModuleWeights) -> bool:
    return module.magnitude is not None and not module.by_feature


@pytest.mark.parametrize("name", fixtures.ADAPTERS)
def test_what_was_read_is_written_and_comes_back_the_same(tmp_path: Path, name: str) -> None:
    model = fixtures.model(fixtures.base_of(name))
    weights = _read(fixtures.adapter(name), model)
    by_token = [path for path, one in weights.items() if path == EMBEDDING and _is_by_token(one)]
    if by_token:
        # Trained rows beside DoRA: exact with mlx-lm's kind of magnitudes, which this format has not.
        with pytest.raises(InvalidAdapterError, match="a magnitude for each token"):
            write_adapter(tmp_path / "a", weights, "peft", model)
        return
    write_adapter(tmp_path / "a", weights, "peft", model)
    # Falcon-H1's factors are divided out and multiplied in again.
    tolerance = 3e-7 if fixtures.base_of(name) == "falcon_h1" else 0.0
    _assert_same(_read(tmp_path / "a", model), weights, tolerance)


def _experts(rank: int, seed: int, inputs: int = 32, outputs: int = 24, scale: float = 1.5) -> ModuleWeights:
    rng = np.random.default_rng(seed)
    a, b = (mx.array(rng.normal(0, 0.2, shape)) for shape in ((4, rank, inputs), (4, outputs, rank)))
    return ModuleWeights(a.astype(mx.float32), b.astype(mx.float32), None, scale)


def _padded(module: ModuleWeights, rank: int) -> ModuleWeights:
    missing = [(0, 0), (0, 0), (0, rank - module.rank)]
    a = mx.pad(module.lora_a, [missing[0], missing[2], missing[1]])
    return replace(module, lora_a=a, lora_b=mx.pad(module.lora_b, missing))


@pytest.mark.parametrize(
    "weights",
    [
        {GATE: _experts(2, 1), UP: _experts(2, 2)},
        {GATE: _experts(1, 1), UP: _experts(3, 2), DOWN: _experts(2, 3, 24, 32, 0.7)},
        {GATE: _experts(2, 1)},
        {UP: _experts(2, 1), DOWN: _experts(1, 3, 24, 32)},
        {GATE: _padded(_experts(2, 1), 4), UP: _padded(_experts(3, 2), 4)},
        {GATE: replace(_experts(2, 1), lora_b=mx.zeros((4, 24, 2))), DOWN: _experts(1, 3, 24, 32)},
    ],
)
def test_experts_of_any_ranks_come_back_the_same(tmp_path: Path, weights: Weights) -> None:
    model = fixtures.model("qwen3_moe")
    write_adapter(tmp_path / "a", weights, "peft", model, dropout=0.1)
    found = _read(tmp_path / "a", model)
    if not mx.any(weights.get(GATE, weights.get(UP, weights.get(DOWN))).lora_b).item():  # type: ignore[union-attr]
        assert not mx.any(
            found.pop(UP).lora_b
        ).item()  # nothing says which half it was that has not been trained
    _assert_same(found, weights)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0  # PEFT has none for parameters
    assert config["peft_version"] == "0.21.2"


def test_unlike_scales_of_gate_and_up_are_one_scale_with_the_same_changes(tmp_path: Path) -> None:
    model = fixtures.model("qwen3_moe")
    weights = {GATE: _experts(2, 1, scale=3.0), UP: _experts(2, 2, scale=0.75)}
    write_adapter(tmp_path / "a", weights, "peft", model)
    found = _read(tmp_path / "a", model)
    assert (found[GATE].scale, found[UP].scale) == (3.0, 3.0)
    np.testing.assert_array_equal(np.array(found[UP].lora_b), np.array(weights[UP].lora_b * 0.25))


@pytest.mark.parametrize(
    ("path", "base", "reason"),
    [
        (DOWN, None, "how transformers names and lays out experts depends on the model; name it (--model)"),
        (
            f"{BLOCK}.fc1",
            "qwen3_moe",
            "how transformers lays out the experts of a qwen3_moe model is not known",
        ),
        (
            DOWN,
            "llama",
            "how transformers lays out the experts of a llama model is not known; write it in mlx-lm's",
        ),
    ],
)
def test_experts_of_models_that_are_not_known_are_refused(
    tmp_path: Path, path: str, base: str | None, reason: str
) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        peft_files({path: _experts(2, 1)}, "it", (), model_type=base)
    (problem,) = refused.value.problems
    assert problem.startswith(f"module {path}: {reason}")


def test_experts_beside_fields_that_peft_has_not_for_them_are_refused(tmp_path: Path) -> None:
    model = fixtures.model("qwen3_moe")
    q = "model.layers.0.self_attn.q_proj"
    linear = ModuleWeights(mx.ones((32, 2)), mx.ones((2, 32)), None, 1.0)
    for beside, field in (
        (replace(linear, magnitude=mx.ones(32)), "use_dora"),
        (replace(linear, bias=mx.ones(32)), "lora_bias"),
    ):
        with pytest.raises(InvalidAdapterError, match=f"{DOWN}: .* which PEFT has not beside {field}"):
            write_adapter(tmp_path / "a", {DOWN: _experts(2, 1, 24, 32), q: beside}, "peft", model)


def test_a_bias_beside_an_embedding_is_refused(tmp_path: Path) -> None:
    model = fixtures.model("llama")
    weights = _read(fixtures.adapter("embedding"), model)
    path = "model.layers.0.self_attn.q_proj"
    weights[path] = replace(weights[path], bias=mx.ones(32))
    with pytest.raises(InvalidAdapterError, match=r"model\.embed_tokens: PEFT has no bias \(lora_bias\)"):
        write_adapter(tmp_path / "a", weights, "peft", model)


@pytest.mark.parametrize("name", ["embedding-dora", "lookup-dora"])
def test_a_dora_by_feature_is_refused_in_mlx_lms_format(tmp_path: Path, name: str) -> None:
    model = fixtures.model(fixtures.base_of(name))
    weights = _read(fixtures.adapter(name), model)
    with pytest.raises(InvalidAdapterError) as refused:
        write_adapter(tmp_path / "a", weights, "mlx", model)
    assert any("a magnitude for each feature of the embedding" in one for one in refused.value.problems)
    assert not (tmp_path / "a").exists()


def test_a_dora_by_feature_is_seen_without_a_model_and_told_apart() -> None:
    unplaced = read_unplaced(fixtures.adapter("embedding-dora"))
    assert unplaced.parts[EMBEDDING].rank == 4
    assert "whether head and embedding are one" in unplaced.open[EMBEDDING]
    square = ModuleWeights(mx.ones((32, 2)), mx.ones((2, 32)), mx.ones(32), 1.0)
    both = [
        AdapterContainer.from_weights({EMBEDDING: replace(square, by_feature=by_feature)}, "it")
        for by_feature in (False, True)
    ]
    assert both[0].digest != both[1].digest
    path = "model.layers.0.self_attn.q_proj"
    linear = AdapterContainer.from_weights({path: replace(square, by_feature=True)}, "it")
    with pytest.raises(InvalidAdapterError, match="magnitudes by feature are for embeddings, got a Linear"):
        linear.check(fixtures.model("llama"))


def test_what_would_be_refused_when_it_is_read_is_not_written(tmp_path: Path) -> None:
    model = fixtures.model("qwen3_moe")
    q, k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    half = mx.zeros((4, 2049, 32)), mx.zeros((4, 24, 2049))
    weights = {
        GATE: ModuleWeights(half[0], half[1] + 1, None, 1.0),
        UP: ModuleWeights(half[0] + 1, half[1] + 1, None, 1.0),
        q: ModuleWeights(mx.zeros((32, 4097)), mx.zeros((4097, 32)), None, 1.0),
        k: ModuleWeights(mx.zeros((32, 2)), mx.zeros((2, 32)), None, -1e6),
        v: ModuleWeights(mx.zeros((32, 2)), mx.zeros((2, 32)), None, float("nan")),
    }
    with pytest.raises(InvalidAdapterError) as refused:
        write_adapter(tmp_path / "a", weights, "peft", model)
    assert sorted(refused.value.problems) == [
        f"module {k}: expected a lora_alpha between -1e+06 and 1e+06, got -2e+06 (scale -1e+06 times rank 2)",
        f"module {q}: expected a rank of at most 4096, got 4097",
        f"module {v}: expected a lora_alpha between -1e+06 and 1e+06, got nan (scale nan times rank 2)",
        "module model.layers.1.mlp.experts.gate_up_proj: expected a rank of at most 4096, got 4098",
    ]
    assert not (tmp_path / "a").exists()


def test_more_unlike_ranks_than_are_read_are_not_written() -> None:
    weights = {
        f"model.layers.{layer}.q_proj": ModuleWeights(
            mx.zeros((4, 1 + layer % 2)), mx.zeros((1 + layer % 2, 4)), None, 1.0
        )
        for layer in range(4100)
    }
    with pytest.raises(
        InvalidAdapterError, match="at most 2048 modules with ranks other than most, got 2050"
    ):
        peft_files(weights, "it", ())

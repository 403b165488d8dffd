"""Adapters written in mlx-lm's and in PEFT's format: read back the same, and taken by mlx-lm itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import mixtral
from mlx_lm.tuner.utils import load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.protocol import FormatName
from adapters_core.formats.writing import write_adapter
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import dense_weight, factor_shapes
from adapters_core.layers.targets import module_at
from tests.models import adapter_values, logits, make_adapter, relative_error, tiny_llama

Q0, Q1, V2 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.2.self_attn.v_proj",
)
DOWN1, EMBED, HEAD = "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"
FORMATS: tuple[FormatName, ...] = ("mlx", "peft")


def random_weights(
    model: nn.Module,
    paths: Iterable[str],
    ranks: Iterable[int],
    scales: Iterable[float],
    dtype: mx.Dtype = mx.float32,
    is_dora: bool = False,
) -> dict[str, ModuleWeights]:
    """Factors of these ranks and scales for the modules at `paths`; magnitudes near the base's norms."""
    rng = np.random.default_rng(5)
    weights = {}
    for path, rank, scale in zip(paths, ranks, scales, strict=True):
        module = module_at(model, path)
        shapes = factor_shapes(module, rank, is_dora)
        a, b = (mx.array(rng.normal(0, 0.2, shapes[leaf]), dtype=dtype) for leaf in ("lora_a", "lora_b"))
        m = mx.linalg.norm(dense_weight(module), axis=1) * 1.3 if is_dora else None
        weights[path] = ModuleWeights(a, b, m, scale)
    return weights


def tensors(weights: dict[str, ModuleWeights]) -> dict[str, Any]:
    """Everything about `weights` that can be compared: bits, dtypes, scales."""
    return {
        path: [
            one.scale,
            *(
                None
                if array is None
                else (array.dtype, array.shape, np.array(array.reshape(-1).view(mx.uint8)).tobytes())
                for array in (one.lora_a, one.lora_b, one.magnitude, one.bias)
            ),
        ]
        for path, one in weights.items()
    }


def written(
    folder: Path, weights: dict[str, ModuleWeights], to: FormatName, model: nn.Module, **options: Any
) -> dict[str, ModuleWeights]:
    """What a folder written in the format `to` brings to `model`."""
    write_adapter(folder, weights, to, model, **options)
    container = AdapterContainer.from_directory(folder)
    assert container.format == to
    return container.check(model)


def adapted_logits(model: nn.Module, weights: dict[str, ModuleWeights]) -> np.ndarray:
    container = AdapterContainer.from_weights(weights, "test")
    container.load(into=model)
    found = logits(model)
    container.unload(from_=model)
    return found


def mlx_lm_logits(folder: Path, model: nn.Module) -> np.ndarray:
    load_adapters(model, str(folder))
    model.eval()
    return logits(model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("formats", [("mlx", "peft", "mlx"), ("peft", "mlx", "peft")])
def test_a_round_trip_gives_the_same_bits(
    tmp_path: Path, formats: tuple[FormatName, ...], is_dora: bool, dtype: mx.Dtype
) -> None:
    model = tiny_llama()
    paths = [Q0, Q1, V2, DOWN1, HEAD]
    first = random_weights(model, paths, [4] * 5, [20 / 3] * 5, dtype, is_dora)
    weights = first
    for step, to in enumerate(formats):
        weights = written(tmp_path / str(step), weights, to, model)
        assert tensors({path: weights[path] for path in paths}) == tensors(first)
    for file in (tmp_path / "0").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("is_dora", [False, True])
def test_mlx_lm_takes_other_ranks_and_scales_in_any_modules(
    tmp_path: Path, is_dora: bool, bits: int | None
) -> None:
    model = tiny_llama(0, bits)
    paths, ranks, scales = [Q0, V2, DOWN1, HEAD], [4, 6, 1, 3], [2.0, 3.0, 0.5, 2.0]
    weights = random_weights(model, paths, ranks, scales, is_dora=is_dora)
    expected = adapted_logits(model, weights)
    found = written(tmp_path / "a", weights, "mlx", model)
    assert {one.scale for one in found.values()} == {2.0}
    assert {one.rank for one in found.values()} == {6}
    assert relative_error(adapted_logits(model, found), expected) < 1e-6
    assert relative_error(mlx_lm_logits(tmp_path / "a", tiny_llama(0, bits)), expected) < 1e-4
    assert relative_error(expected, logits(model)) > 0.01


def test_peft_keeps_every_rank_and_scale(tmp_path: Path) -> None:
    model = tiny_llama()
    paths, ranks, scales = [Q0, Q1, V2, DOWN1, HEAD], [4, 6, 4, 1, 7], [2.0, 1 / 3, 2.0, 0.1, -20 / 7]
    weights = random_weights(model, paths, ranks, scales)
    found = written(tmp_path / "a", weights, "peft", model)
    assert tensors({path: found[path] for path in paths}) == tensors(weights)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_alpha"].__class__) == (4, 8, int)
    assert config["rank_pattern"]["^model\\.layers\\.1\\.self_attn\\.q_proj"] == 6
    assert config["target_modules"] == [HEAD, Q0, DOWN1, Q1, V2]


def test_a_pattern_means_one_module_alone(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [tiny_llama(1).model.layers[0]]
            self.lm_head = nn.Linear(64, 8)
            self.draft = {"lm_head": nn.Linear(64, 8)}

    model = Twice()
    mx.eval(model.parameters())
    weights = random_weights(model, ["lm_head", "draft.lm_head"], [2, 3], [1.0, 4.0])
    assert tensors(written(tmp_path / "a", weights, "peft", model)) == tensors(weights)


def test_powers_of_two_stay_in_bf16_and_others_go_to_float32(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2, DOWN1], [4] * 4, [2.0, 2.0, 0.25, 6.0], mx.bfloat16)
    found = written(tmp_path / "a", weights, "mlx", model)
    assert tensors({Q0: found[Q0]}) == tensors({Q0: weights[Q0]})
    assert mx.array_equal(found[V2].lora_b * 8, weights[V2].lora_b)
    assert (found[V2].lora_b.dtype, found[DOWN1].lora_b.dtype) == (mx.bfloat16, mx.float32)
    assert mx.array_equal(found[DOWN1].lora_b, weights[DOWN1].lora_b.astype(mx.float32) * 3)


def test_a_scale_that_leaves_float16_goes_to_float32(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2], [2] * 3, [1.0, 1.0, 2.0**-20], mx.float16)
    found = written(tmp_path / "a", weights, "mlx", model)[V2]
    assert found.lora_b.dtype == mx.float32
    assert mx.array_equal(found.lora_b * 2.0**20, weights[V2].lora_b.astype(mx.float32))


def test_a_scale_of_zero_changes_nothing_and_no_other_module(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2], [2] * 3, [0.0, 0.0, 3.0])
    found = written(tmp_path / "a", weights, "mlx", model)
    assert found[V2].scale == 3.0
    assert not mx.any(found[Q0].lora_b).item()
    none = written(tmp_path / "b", {Q0: weights[Q0]}, "mlx", model)
    assert tensors(none) == tensors({Q0: weights[Q0]})


@pytest.mark.parametrize(
    ("paths", "num_layers", "keys"),
    [
        ([f"model.layers.{n}.self_attn.q_proj" for n in range(3)], -1, ["self_attn.q_proj"]),
        (
            ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj", HEAD],
            1,
            [HEAD, "mlp.up_proj", "self_attn.q_proj"],
        ),
        ([Q0, Q1], -1, [Q0, Q1]),
        ([Q1, V2], -1, [Q1, V2]),
        ([HEAD], -1, [HEAD]),
    ],
)
def test_keys_choose_exactly_the_modules(
    tmp_path: Path, paths: list[str], num_layers: int, keys: list[str]
) -> None:
    model = tiny_llama()
    weights = random_weights(model, paths, [2] * len(paths), [2.0] * len(paths))
    for name, known in (("known", model), ("unknown", None)):
        write_adapter(tmp_path / name, weights, "mlx", known)
        container = AdapterContainer.from_directory(tmp_path / name)
        assert container.check(model).keys() == set(paths)
        theirs = tiny_llama()
        load_adapters(theirs, str(tmp_path / name))
        assert {path for path, module in theirs.named_modules() if "lora_a" in module} == set(paths)
    config = AdapterContainer.from_directory(tmp_path / "known").config
    assert (config.num_layers, config.lora_parameters.keys) == (num_layers, keys)


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_embedding_and_its_tied_head(tmp_path: Path, is_tied: bool) -> None:
    model, theirs = (tiny_llama(tie_word_embeddings=is_tied) for _ in range(2))
    weights = random_weights(model, [EMBED, Q0], [4, 4], [2.0, 2.0])
    expected = adapted_logits(model, weights)
    assert relative_error(adapted_logits(model, {Q0: weights[Q0]}), expected) > 0.01
    assert tensors(written(tmp_path / "mlx", weights, "mlx", model)) == tensors(weights)
    assert relative_error(mlx_lm_logits(tmp_path / "mlx", theirs), expected) < 1e-4
    write_adapter(tmp_path / "peft", weights, "peft", model)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is is_tied
    file = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert isinstance(file, dict)
    assert mx.array_equal(file[f"base_model.model.{EMBED}.lora_embedding_A"], weights[EMBED].lora_a.T)
    assert mx.array_equal(file[f"base_model.model.{EMBED}.lora_embedding_B"], weights[EMBED].lora_b.T)


def tiny_mixtral() -> nn.Module:
    mx.random.seed(0)
    fields = {
        "model_type": "mixtral", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    model = mixtral.Model(mixtral.ModelArgs(**fields))
    mx.eval(model.parameters())
    model.eval()
    return model


def test_experts_in_both_formats(tmp_path: Path) -> None:
    model = tiny_mixtral()
    up, down = (f"model.layers.1.block_sparse_moe.switch_mlp.{name}_proj" for name in ("up", "down"))
    weights = random_weights(model, [up, down, Q1], [2, 3, 2], [2.0, 1.0, 2.0])
    expected = adapted_logits(model, weights)
    found = written(tmp_path / "a", weights, "mlx", model)
    assert found[up].lora_a.shape == (4, 3, 64)
    assert relative_error(adapted_logits(model, found), expected) < 1e-6
    assert relative_error(mlx_lm_logits(tmp_path / "a", tiny_mixtral()), expected) < 1e-4
    assert tensors(written(tmp_path / "b", weights, "peft", model)) == tensors(weights)


def test_a_bias_is_kept_in_peft_s_format_and_refused_in_mlx_lm_s(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1], [2, 2], [2.0, 2.0])
    weights[Q0] = replace(weights[Q0], bias=mx.arange(64, dtype=mx.float32))
    mx.eval(weights[Q0].bias)
    found = written(tmp_path / "a", weights, "peft", model)
    assert tensors({Q0: found[Q0]}) == tensors({Q0: weights[Q0]})
    no_bias = found[Q1].bias
    assert no_bias is not None
    assert mx.array_equal(no_bias, mx.zeros(64))
    with pytest.raises(InvalidAdapterError, match=rf"{Q0}: it has a bias") as caught:
        write_adapter(tmp_path / "b", weights, "mlx", model)
    assert len(caught.value.problems) == 1


def test_what_neither_format_can_say_is_refused_with_the_whole_list(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2], [2] * 3, [2.0] * 3, is_dora=True)
    weights |= random_weights(model, [HEAD, DOWN1], [2, 2], [1.0, 1.0])
    for to in FORMATS:
        with pytest.raises(InvalidAdapterError) as caught:
            write_adapter(tmp_path / to, weights, to, model)
        assert len(caught.value.problems) == 2
        assert all("one kind for all" in problem for problem in caught.value.problems)
        with pytest.raises(InvalidAdapterError, match="there is none"):
            write_adapter(tmp_path / to, {}, to, model)
    dora = random_weights(model, [EMBED, Q0], [2, 2], [1.0, 1.0], is_dora=True)
    with pytest.raises(InvalidAdapterError, match=f"{EMBED}: its DoRA has a magnitude for each token"):
        write_adapter(tmp_path / "embedding", dora, "peft", model)
    biased = {Q0: replace(dora[Q0], bias=mx.zeros(64))}
    with pytest.raises(InvalidAdapterError, match="no bias"):
        write_adapter(tmp_path / "bias", biased, "peft", model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("to", FORMATS)
def test_what_was_trained_can_be_written(tmp_path: Path, to: FormatName, kind: str) -> None:
    model = tiny_llama()
    config = AdapterConfig.from_values(adapter_values(kind), "new")
    adapter = AdapterContainer.from_model(model, config)
    for path, module in model.named_modules():
        if path.endswith("q_proj"):
            module["lora_b"] = mx.full(module["lora_b"].shape, 0.1)
    model.eval()
    expected = logits(model)
    adapter.unload(from_=model)
    assert relative_error(logits(model), expected) > 0.01
    found = written(tmp_path / "a", adapter.check(model), to, model)
    assert relative_error(adapted_logits(model, found), expected) < 1e-6


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_is_whole_or_not_there(tmp_path: Path, to: FormatName) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0], [2], [2.0])
    folder = make_adapter(tmp_path / "there", model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError):
        write_adapter(folder, weights, to, model)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="JSON"):
        write_adapter(tmp_path / "new", weights, "peft", model, dropout=float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    write_adapter(tmp_path / "deep" / "er", weights, to, model, base_name="Tiny", dropout=0.1)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["er"]
    container = AdapterContainer.from_directory(tmp_path / "deep" / "er")
    assert container.check(model).keys() == {Q0}

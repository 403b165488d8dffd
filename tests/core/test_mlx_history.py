"""Folders as each version of mlx-lm, and Unsloth's trainer on MLX, wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen2_moe
from mlx_lm.tuner.utils import linear_to_lora_layers

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.report import LoadReport
from tests.models import adapter_tensors, adapter_values, logits, tiny_llama, write_adapter

QV = ["self_attn.q_proj", "self_attn.v_proj"]
# What the trainer of mlx-lm 0.12.0, and of 0.16.1, wrote beside the parameters.
_TRAINER = {
    "model": "mlx_model",
    "train": True,
    "data": "data/",
    "seed": 0,
    "lora_layers": 2,
    "batch_size": 4,
    "iters": 1000,
    "learning_rate": 1e-5,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "lr_schedule": None,
}
_OLD = {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0}


def _tensors(
    model: nn.Module, keys: list[str], num_layers: int = -1, kind: str = "lora"
) -> dict[str, mx.array]:
    return adapter_tensors(model, adapter_values(kind, rank=8, keys=keys, num_layers=num_layers), size=0.05)


def _as_trained(
    model: nn.Module, tensors: dict[str, mx.array], scale: float, kind: str = "lora"
) -> np.ndarray:
    """The logits of mlx-lm's own layers in the very modules that `tensors` name."""
    keys = list({name.rpartition(".")[0] for name in tensors})
    parameters = {"rank": 8, "scale": scale, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, -1, parameters, use_dora=kind == "dora")
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    return logits(model)


def _ours(folder: Path, model: nn.Module, scale: float | None = None) -> np.ndarray:
    AdapterContainer.from_directory(folder, scale=scale).load(into=model)
    return logits(model)


def _notes(folder: Path, model: nn.Module, scale: float | None = None) -> str:
    return "\n".join(AdapterContainer.from_directory(folder, scale=scale).place(model).warnings)


@pytest.mark.parametrize("extra", [{}, {"use_dora": False}], ids=["0.6 to 0.13", "0.14 to 0.18"])
def test_a_folder_of_2024_has_query_and_value_of_its_last_layers(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    tensors = _tensors(tiny_llama(), QV, num_layers=2)
    folder = write_adapter(tmp_path / "a", {**_TRAINER, **extra, "lora_parameters": _OLD}, tensors)
    expected = _as_trained(tiny_llama(), tensors, 10.0)
    np.testing.assert_allclose(_ours(folder, tiny_llama()), expected, atol=1e-5, rtol=0)
    assert AdapterContainer.from_directory(folder).base_name == "mlx_model"


def test_use_dora_is_dora(tmp_path: Path) -> None:
    tensors = _tensors(tiny_llama(), QV, num_layers=2, kind="dora")
    values = {**_TRAINER, "use_dora": True, "lora_parameters": _OLD}
    folder = write_adapter(tmp_path / "a", values, tensors)
    expected = _as_trained(tiny_llama(), tensors, 10.0, "dora")
    np.testing.assert_allclose(_ours(folder, tiny_llama()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keys", [QV, ["mlp.gate_proj"], [*QV, "self_attn.k_proj", "mlp.down_proj"]])
def test_without_keys_the_files_tensors_tell_them(tmp_path: Path, keys: list[str]) -> None:
    tensors = _tensors(tiny_llama(), keys)
    folder = write_adapter(tmp_path / "a", adapter_values(rank=8, keys=None), tensors)
    assert AdapterContainer.from_directory(folder).check(tiny_llama()).keys() == {
        f"model.layers.{layer}.{key}" for layer in range(3) for key in keys
    }
    lost = "model.layers.1." + keys[0]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    write_adapter(folder, None, kept)
    with pytest.raises(InvalidAdapterError, match=f"{lost}.lora_a: expected shape"):
        AdapterContainer.from_directory(folder).check(tiny_llama())


def test_the_scale_of_2024_has_two_readings_and_a_way_to_choose(tmp_path: Path) -> None:
    tensors = _tensors(tiny_llama(), QV)
    values = {"lora_layers": 16, "lora_parameters": _OLD}
    folder = write_adapter(tmp_path / "a", values, tensors)
    notes = _notes(folder, tiny_llama())
    assert "scale * alpha / rank = 20" in notes
    assert "scale = 10. 10 is used." in notes
    assert (
        read_unplaced(folder).warnings == AdapterContainer.from_directory(folder).place(tiny_llama()).warnings
    )
    digests = set()
    for scale, note in ((None, "20"), (10.0, ""), (20.0, "The scale 20 was given")):
        container = AdapterContainer.from_directory(folder, scale=scale)
        mapped = container.place(tiny_llama())
        assert {one.scale for one in mapped.weights.values()} == {scale or 10.0}
        assert note in "\n".join(mapped.warnings)
        assert bool(mapped.warnings) == bool(note)
        digests.add(container.digest)
        expected = _as_trained(tiny_llama(), tensors, scale or 10.0)
        np.testing.assert_allclose(_ours(folder, tiny_llama(), scale), expected, atol=1e-5, rtol=0)
    assert len(digests) == 2
    report = LoadReport.of(container, {}, mapped.warnings)
    assert "The scale 20 was given" in report.warnings[0]


def test_a_chosen_scale_is_saved_without_the_other_reading(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", {"lora_layers": 16, "lora_parameters": _OLD}, _tensors(tiny_llama(), QV)
    )
    AdapterContainer.from_directory(folder, scale=20.0).save(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["num_layers"] == 16
    assert written["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": 20.0}
    assert _notes(tmp_path / "b", tiny_llama()) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_layers": 16, "lora_parameters": _OLD}, ""),
        ({"lora_layers": 16, "lora_parameters": _OLD | {"alpha": 8}}, ""),
        ({"lora_layers": 16, "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 10.0}}, ""),
        ({**_TRAINER, "lora_parameters": _OLD}, "so that it is likely older"),
        ({**_TRAINER, "use_dora": False, "lora_parameters": _OLD}, "has use_dora, which came with 0.14.0"),
        ({"num_layers": 16, "lora_parameters": {"rank": 8, "dropout": 0.0}}, "has no scale, and 10 is taken"),
    ],
)
def test_only_a_scale_that_is_in_doubt_is_told(values: dict[str, Any], expected: str) -> None:
    notes = "\n".join(AdapterConfig.from_values(values, "a").notes)
    assert expected in notes
    assert bool(notes) == bool(expected)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lora_layers": 4, "num_layers": 8}, "num_layers is 8 and lora_layers, its older name, 4"),
        ({"use_dora": True, "fine_tune_type": "lora"}, "use_dora is true and fine_tune_type 'lora'"),
        ({"lora_layers": "all"}, "num_layers: expected a whole number"),
        ({"rank": 10, "alpha": 0.1, "dropout": 0.1}, "an older mlx-vlm"),
        ({"num_layers": 4, "lora_parameters": {"rank": 8, "alpha": 16}}, "or load the adapter with a scale"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterConfig.from_values(values, "a")
    assert problem in "\n".join(refused.value.problems)


def test_a_scale_that_is_given_stands_in_for_one_that_is_missing(tmp_path: Path) -> None:
    values = {"num_layers": -1, "lora_parameters": {"rank": 8, "alpha": 16}}
    folder = write_adapter(tmp_path / "a", values, _tensors(tiny_llama(), QV))
    assert "in place of one, which it lacks" in _notes(folder, tiny_llama(), 2.0)


@pytest.mark.parametrize(("given", "trained"), [(2, -1), (1, -1), (-1, 2)])
def test_num_layers_of_0_19_to_0_21_meant_other_layers(tmp_path: Path, given: int, trained: int) -> None:
    tensors = _tensors(tiny_llama(), QV, num_layers=trained)
    values: Any = {"fine_tune_type": "lora", "num_layers": given, "lora_parameters": dict(_OLD)}
    folder = write_adapter(tmp_path / "a", values, tensors)
    expected = _as_trained(tiny_llama(), tensors, 10.0)
    np.testing.assert_allclose(_ours(folder, tiny_llama()), expected, atol=1e-5, rtol=0)
    assert f"says num_layers {given}" in _notes(folder, tiny_llama())
    del values["lora_parameters"]["alpha"]
    if given > 0:
        write_adapter(folder, values, None)
        with pytest.raises(
            InvalidAdapterError, match=r"wrote it, set num_layers to 3.*leaves this module out"
        ):
            AdapterContainer.from_directory(folder).check(tiny_llama())


def _tiny_moe() -> nn.Module:
    args = {
        "model_type": "qwen2_moe", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32, "rms_norm_eps": 1e-5, "vocab_size": 96,
    }  # fmt: skip
    mx.random.seed(0)
    model = qwen2_moe.Model(qwen2_moe.ModelArgs.from_dict(args))
    mx.eval(model.parameters())
    model.eval()
    return model


def test_experts_of_0_14_to_0_28_have_one_matrix_for_all(tmp_path: Path) -> None:
    tensors = _tensors(_tiny_moe(), ["mlp.switch_mlp.up_proj", "mlp.gate"])
    flat = {
        name: tensor.reshape(-1, tensor.shape[-1]) if name.endswith("lora_a") and tensor.ndim == 3 else tensor
        for name, tensor in tensors.items()
    }
    assert any(flat[name].shape != tensors[name].shape for name in flat)
    values = {"lora_layers": -1, "use_dora": False, "lora_parameters": _OLD | {"alpha": 8}}
    folder = write_adapter(tmp_path / "a", values, flat)
    expected = _as_trained(_tiny_moe(), tensors, 10.0)
    np.testing.assert_allclose(_ours(folder, _tiny_moe()), expected, atol=1e-5, rtol=0)
    assert read_unplaced(folder).weights.keys() == {name.rpartition(".")[0] for name in tensors}
    saved = AdapterContainer.from_directory(folder)
    saved.save(tmp_path / "b")
    written = cast("dict[str, mx.array]", mx.load(str(tmp_path / "b" / "adapters.safetensors")))
    assert all(mx.array_equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_unsloths_folders_on_mlx_are_in_mlx_lms_format(tmp_path: Path, kind: str) -> None:
    paths = [f"model.layers.{layer}.{key}" for layer in (1, 2) for key in QV]
    tensors = _tensors(tiny_llama(), paths, kind=kind)
    values = {
        "fine_tune_type": kind,
        "peft_type": "LORA",
        "base_model_name_or_path": "unsloth/Llama-3.2-1B-Instruct",
        "learning_rate": 2e-4,
        "max_steps": 60,
        "base_quantization_config": None,
        "num_layers": 3,
        "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": paths},
        "rank": 8,
        "scale": 2.0,
        "dropout": 0.0,
        "requires_unsloth_mlx_runtime_quantization": False,
        "unsloth_mlx_lora_module_paths": paths,
    }
    folder = write_adapter(tmp_path / "a", values, tensors)
    container = AdapterContainer.from_directory(folder)
    assert (container.format, container.base_name) == ("mlx", "unsloth/Llama-3.2-1B-Instruct")
    expected = _as_trained(tiny_llama(), tensors, 2.0, kind)
    np.testing.assert_allclose(_ours(folder, tiny_llama()), expected, atol=1e-4, rtol=0)
    assert _notes(folder, tiny_llama()) == ""


def test_pefts_scale_cannot_be_given(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"peft_type": "LORA", "target_modules": ["q_proj"]}, None)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(InvalidAdapterError, match="lora_alpha and r, and no other can be given for all"):
        AdapterContainer.from_directory(folder, scale=2.0)

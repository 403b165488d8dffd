"""Weights of linear layers that PEFT adapts as parameters: routers of experts, wherever MLX has them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from tests.peft import fixtures

ROUTER = "model.layers.{}.block_sparse_moe.gate"
NAME = "base_model.model.model.layers.{}.mlp.gate.lora_{}.weight"
Tensors = dict[str, mx.array]


def test_routers_of_an_all_linear_adapter_are_found_where_mlx_has_them() -> None:
    weights = AdapterContainer.from_directory(fixtures.adapter("routers-mixtral")).check(
        fixtures.model("mixtral")
    )
    found = [(weights[ROUTER.format(layer)].rank, weights[ROUTER.format(layer)].scale) for layer in range(2)]
    assert found == [(3, 4 / 3), (3, 5 / 3)]
    every = AdapterContainer.from_directory(fixtures.adapter("routers-qwen3")).check(
        fixtures.model("qwen3_moe")
    )
    assert every["model.layers.1.mlp.gate"].rank == 2
    assert every["model.layers.1.mlp.switch_mlp.up_proj"].rank == 4


@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe"])
def test_a_router_as_a_module_of_transformers_4_is_the_same(tmp_path: Path, base: str) -> None:
    block = "block_sparse_moe" if base == "mixtral" else "mlp"
    name = "routers-mixtral" if base == "mixtral" else "routers-qwen3"

    def renamed(tensors: Tensors) -> Tensors:
        kept = {key: value for key, value in tensors.items() if ".experts." not in key}
        return {key.replace(".mlp.gate.", f".{block}.gate."): value for key, value in kept.items()}

    patterns = {"rank_pattern": {"gate": 3} if base == "mixtral" else {}, "alpha_pattern": {}}
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate"], "target_parameters": None}
    targets |= {"target_modules": ["q_proj", "gate"]} if base == "mixtral" else {}
    folder = fixtures.changed(tmp_path / "a", name, patterns | targets, renamed)
    model = fixtures.model(base)
    weights = AdapterContainer.from_directory(folder).check(model)
    original = AdapterContainer.from_directory(fixtures.adapter(name)).check(model)
    path = f"model.layers.0.{block}.gate"
    for leaf in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(
            np.array(getattr(weights[path], leaf)), np.array(getattr(original[path], leaf))
        )


@pytest.mark.parametrize(
    ("name", "fields", "part", "expected"),
    [
        (
            "routers-mixtral",
            {"target_parameters": ["experts.down_proj"]},
            None,
            "leaves module model.layers.0.mlp.gate out",
        ),
        ("routers-mixtral", {"rank_pattern": {}}, None, "expected shape (2, 32) (rank 2), got (3, 32)"),
        ("routers-mixtral", {"peft_version": "0.19.1"}, None, "laid out in other ways before PEFT 0.20"),
        ("routers-mixtral", {}, "layers.1.mlp.gate", "module model.layers.1.mlp.gate: expected tensors"),
        (
            "routers-mixtral",
            {"target_parameters": ["layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]},
            "layers.1.mlp.gate",
            "module model.layers.1.mlp.gate: expected tensors",
        ),
        ("parameter", {}, "k_proj", "module model.layers.0.self_attn.k_proj: expected tensors"),
        (
            "gpt2",
            {
                "target_modules": ["c_attn", "c_fc", "mlp.c_proj"],
                "target_parameters": ["attn.c_proj.weight"],
                "peft_version": "0.21.2",
            },
            None,
            "the weight lies transposed in transformers",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, fields: dict[str, object], part: str | None, expected: str
) -> None:
    def without(tensors: Tensors) -> Tensors:
        return {key: value for key, value in tensors.items() if part is None or part not in key}

    folder = fixtures.changed(tmp_path / "a", name, fields, without)
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterContainer.from_directory(folder).check(fixtures.model(fixtures.base_of(name)))
    assert expected in "\n".join(refused.value.problems)


def test_without_a_model_it_is_open_where_a_parameter_lies() -> None:
    unplaced = read_unplaced(fixtures.adapter("routers-mixtral"))
    name = "model.layers.0.mlp.gate"
    assert unplaced.open[name] == "where the module of a parameter lies depends on the model"
    assert unplaced.parts[name].rank == 3


def test_routers_are_written_as_the_parameters_that_peft_makes_of_them(tmp_path: Path) -> None:
    model = fixtures.model("mixtral")
    weights = AdapterContainer.from_directory(fixtures.adapter("routers-mixtral")).check(model)
    write_adapter(tmp_path / "a", weights, "peft", model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    file = mx.load(str(tmp_path / "a" / "adapter_model.safetensors"))
    assert isinstance(file, dict)
    assert file[NAME.format(1, "A")].shape == (3, 32)

"""Which modules an adapter adapts, and replacing modules all or none."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import qwen2_moe
from mlx_lm.tuner.utils import linear_to_lora_layers

from adapters_core.config import AdapterConfig
from adapters_core.errors import ContainerStateError, InvalidAdapterError, UnsupportedModelError
from adapters_core.layers.modules import ModuleKind, kind_of, weight_shape
from adapters_core.layers.surgery import Modes, replace_modules
from adapters_core.layers.targets import (
    adaptable_layers,
    default_keys,
    module_at,
    named_base_modules,
    resolve_targets,
)
from tests.models import QKV, adapter_values, snapshot, tiny_llama

ALL_KEYS = {*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def _config(kind: str = "lora", **values: object) -> AdapterConfig:
    return AdapterConfig.from_values(adapter_values(kind, **values), "test")  # pyright: ignore[reportArgumentType]


def _refused(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError) as caught:
        resolve_targets(model, config)
    assert snapshot(model) == before
    return caught.value.problems


class _Standing(nn.Module):
    """A wrapper as a bank puts into a model."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def reverted(self) -> nn.Module:
        return self.linear


def _tiny_moe() -> nn.Module:
    arguments = qwen2_moe.ModelArgs(
        model_type="qwen2_moe",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        num_experts_per_tok=1,
        num_experts=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        rms_norm_eps=1e-5,
        vocab_size=32,
        num_key_value_heads=2,
    )
    return qwen2_moe.Model(arguments)


def test_layers_and_default_keys() -> None:
    model = tiny_llama()
    assert adaptable_layers(model) == [(f"model.layers.{i}", layer) for i, layer in enumerate(model.layers)]
    assert set(default_keys(model)) == ALL_KEYS
    assert len(default_keys(model)) == len(ALL_KEYS)
    assert set(default_keys(tiny_llama(0, 4))) == ALL_KEYS


@pytest.mark.parametrize(("num_layers", "layers"), [(-1, 3), (0, 3), (1, 1), (2, 2), (3, 3), (16, 3)])
def test_num_layers_counts_from_the_last(num_layers: int, layers: int) -> None:
    model = tiny_llama()
    expected = {f"model.layers.{i}.{key}" for i in range(3 - layers, 3) for key in ALL_KEYS}
    targets = resolve_targets(model, _config(num_layers=num_layers, keys=None))
    assert targets.keys() == expected
    assert all(module is module_at(model, path) for path, module in targets.items())


def test_keys_are_relative_or_full_paths() -> None:
    config = _config(num_layers=1, keys=["self_attn.q_proj", "lm_head", "model.layers.0.mlp.up_proj"])
    assert resolve_targets(tiny_llama(), config).keys() == {
        "model.layers.2.self_attn.q_proj",
        "lm_head",
        "model.layers.0.mlp.up_proj",
    }


def test_every_key_that_matches_nothing_is_named() -> None:
    keys = ["self_attn.q_proj", "self_attn.qq_proj", "q_proj", "model.layers.9.mlp.up_proj", "", " "]
    problems = _refused(
        tiny_llama(tie_word_embeddings=True), _config(keys=[k for k in keys if k] + ["lm_head"])
    )
    assert [problem.split("'")[1] for problem in problems] == [
        "self_attn.qq_proj",
        "q_proj",
        "model.layers.9.mlp.up_proj",
        " ",
        "lm_head",
    ]


def test_a_module_named_twice_is_a_problem() -> None:
    problems = _refused(tiny_llama(), _config(keys=["self_attn.q_proj", "model.layers.1.self_attn.q_proj"]))
    assert len(problems) == 1
    assert "named twice" in problems[0]


@pytest.mark.parametrize("key", ["model.norm", "input_layernorm", "self_attn", "mlp", "model"])
def test_modules_of_no_kind_are_refused_by_name(key: str) -> None:
    problems = _refused(tiny_llama(), _config(num_layers=1, keys=[key, "self_attn.q_proj"]))
    assert len(problems) == 1
    assert key in problems[0]
    assert "only linear layers, embeddings and switch layers" in problems[0]


def _mlx_lms_choice(model: nn.Module, values: dict[str, Any]) -> set[str]:
    linear_to_lora_layers(model, values["num_layers"], {"keys": None, **values["lora_parameters"]})
    return {path for path, module in model.named_modules() if "lora_a" in module}


@pytest.mark.parametrize("num_layers", [-1, 1])
@pytest.mark.parametrize("keys", [None, ["mlp.switch_mlp.up_proj", "model.embed_tokens", "lm_head"]])
def test_the_choice_is_mlx_lms_for_every_kind_of_module(num_layers: int, keys: list[str] | None) -> None:
    values = adapter_values(num_layers=num_layers, keys=keys)
    found = resolve_targets(_tiny_moe(), AdapterConfig.from_values(values, "test"))
    assert found.keys() == _mlx_lms_choice(_tiny_moe(), values)
    kinds = {kind_of(module) for module in found.values()}
    assert ModuleKind.SWITCH in kinds
    assert (ModuleKind.EMBEDDING in kinds) == (keys is not None)
    assert keys is not None or set(default_keys(_tiny_moe())) == {path.split(".", 3)[3] for path in found}


def test_what_mlx_lm_cannot_adapt_either_is_refused_by_name() -> None:
    problems = _refused(_tiny_moe(), _config("dora", num_layers=1, keys=None))
    assert sorted(problem.split()[0] for problem in problems) == [
        f"model.layers.1.mlp.switch_mlp.{name}_proj" for name in ("down", "gate", "up")
    ]
    assert all("SwitchLinear: there is LoRA of experts and no DoRA" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_modules_with_adapters_of_a_form_of_their_own_are_refused(kind: str) -> None:
    class Own(nn.Linear):
        def to_lora(self) -> nn.Module:
            return self

    model = tiny_llama()
    model.layers[2].self_attn.q_proj = Own(64, 64)
    for keys in (QKV, None):
        problems = _refused(model, _config(kind, keys=keys))
        assert len(problems) == 1
        assert "q_proj is a Own" in problems[0]
        assert "to_lora" in problems[0]


def test_models_whose_layers_cannot_be_reached_are_refused() -> None:
    class NoLayers(nn.Module):
        pass

    class StrayLayers(nn.Module):
        @property
        def layers(self) -> list[nn.Module]:
            return [nn.Linear(2, 2), nn.Linear(2, 2)]

    class EmptyLayers(nn.Module):
        layers = ()

    for model, expected in ((NoLayers(), "NoLayers"), (EmptyLayers(), "EmptyLayers"), (StrayLayers(), "[1]")):
        with pytest.raises(UnsupportedModelError, match=r"model\.layers") as caught:
            resolve_targets(model, _config())
        assert expected in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_shapes_of_quantised_layers_are_those_of_the_dense_ones(bits: int) -> None:
    assert weight_shape(nn.Linear(192, 48).to_quantized(64, bits)) == (48, 192)
    assert weight_shape(nn.Linear(192, 48)) == (48, 192)


def test_wrappers_are_seen_through() -> None:
    model = tiny_llama()
    config = _config(keys=None)
    bare = named_base_modules(model)
    targets = resolve_targets(model, config)
    surgery = replace_modules(model, {path: _Standing(linear) for path, linear in list(targets.items())[:4]})
    assert sorted(path for path, _ in named_base_modules(model)) == sorted(path for path, _ in bare)
    wrapped = resolve_targets(model, config)
    assert wrapped.keys() == targets.keys()
    assert all(wrapped[path] is targets[path] and module_at(model, path) is targets[path] for path in targets)
    assert default_keys(model) == default_keys(tiny_llama())
    surgery.undo()


def test_replacing_is_all_or_nothing_and_undone_exactly() -> None:
    model = tiny_llama()
    before = snapshot(model)
    new = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModelError) as caught:
        replace_modules(
            model,
            {
                "model.layers.0.self_attn.q_proj": new,
                "model.layers.7.mlp": new,
                "nope": new,
                "model.norm.weight": new,
            },
        )
    assert len(caught.value.reasons) == 3
    assert snapshot(model) == before

    surgery = replace_modules(model, {"model.layers.0.self_attn.q_proj": new, "lm_head": new})
    assert model.layers[0].self_attn.q_proj is new
    assert model.lm_head is new
    surgery.undo()
    assert snapshot(model) == before
    with pytest.raises(ContainerStateError, match="already"):
        surgery.undo()


def test_undo_refuses_to_bury_a_later_change() -> None:
    model = tiny_llama()
    first = replace_modules(model, {"lm_head": nn.Linear(64, 8), "model.norm": nn.RMSNorm(64)})
    second = replace_modules(model, {"lm_head": nn.Linear(64, 9)})
    during = snapshot(model)
    with pytest.raises(ContainerStateError, match="lm_head"):
        first.undo()
    assert snapshot(model) == during
    second.undo()
    first.undo()
    assert weight_shape(model.lm_head) == (96, 64)


def test_layers_that_share_a_module_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    before = snapshot(model)
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    with pytest.raises(UnsupportedModelError, match="shared"):
        replace_modules(model, {path: nn.Linear(64, 64) for path in paths})
    assert snapshot(model) == before


def test_modes_are_restored() -> None:
    model = tiny_llama(0, 4)
    model.layers[1].freeze()
    model.layers[2].train()
    before = snapshot(model)
    modes = Modes(model)
    model.freeze()
    model.train()
    model.layers[0].unfreeze()
    assert snapshot(model) != before
    modes.restore()
    assert snapshot(model) == before
    assert mx.all(mx.isfinite(model(mx.array([[1, 2]])))).item()

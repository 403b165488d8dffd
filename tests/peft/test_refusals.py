"""What cannot be represented exactly is refused by name; every problem is listed; nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.unplaced import read_unplaced
from tests.models import snapshot
from tests.peft import fixtures

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, mx.array]


def _problems(folder: Path, model: str | None = None) -> list[str]:
    """The problems of the folder by itself, or with the model."""
    if model is None:
        with pytest.raises(InvalidAdapterError) as refused:
            AdapterContainer.from_directory(folder)
        return list(refused.value.problems)
    loaded = fixtures.model(model)
    before = snapshot(loaded)
    container = AdapterContainer.from_directory(folder)
    with pytest.raises(InvalidAdapterError) as refused:
        container.load(into=loaded)
    assert snapshot(loaded) == before
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("modules_to_save", ["(lm_head"], "a list of at most 1024 module names"),
        ("modules_to_save", "lm_head", "a list of at most 1024 module names"),
        ("trainable_token_indices", [-1], "a list of tokens"),
        ("trainable_token_indices", {"embed_tokens": 1}, "a list of tokens"),
        ("layer_replication", [[0, 2], [1, 2]], "layers were repeated"),
        ("alora_invocation_tokens", [5, 7], "aLoRA"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("megatron_config", {"tensor_model_parallel_size": 2}, "Megatron"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "changes the base before training"),
        ("init_lora_weights", "olora", "changes the base before training"),
        ("init_lora_weights", "corda", "changes the base before training"),
        ("init_lora_weights", "lora_ga", "changes the base before training"),
        ("init_lora_weights", "loftq", "quantised in its own way"),
        ("init_lora_weights", "newest", "an unknown initialisation"),
        ("use_next_thing", {"level": 3}, "an unknown field with a value"),
        ("peft_type", "IA3", "only LoRA adapters"),
        ("peft_type", None, "only LoRA adapters"),
        ("r", 0, "a whole number from 1"),
        ("r", True, "a whole number from 1"),
        ("lora_alpha", "16", "a finite number"),
        ("use_rslora", "yes", "true or false"),
        ("bias", "some", '"none", "all" or "lora_only"'),
        ("target_modules", 3, "a list of module names"),
        ("target_modules", [], "the names of the adapted modules"),
        ("target_modules", None, "the names of the adapted modules"),
        ("target_modules", "*q_proj", "a regular expression"),
        ("target_modules", r"(.)\1_proj", "backreference"),
        ("exclude_modules", r"(.)\1.*", "backreference"),
        ("rank_pattern", {"q_proj": 0}, "ranks from 1"),
        ("rank_pattern", {"(q_proj": 2}, "a regular expression"),
        ("alpha_pattern", {"q_proj": "2"}, "finite numbers"),
        ("layers_to_transform", [-1], "a layer's index"),
        ("layers_pattern", "layers", "without layers_to_transform"),
        ("target_parameters", "experts.down_proj", "a list of parameter names"),
    ],
)
def test_a_field_that_cannot_be_followed_is_refused_by_name(
    tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    problems = _problems(fixtures.changed(tmp_path / "a", "plain", {field: value}))
    assert len(problems) == 1
    assert problems[0].startswith(f"adapter_config.json: {field}: ")
    assert reason in problems[0]
    is_known = "an unknown field" not in problems[0]  # of others, nothing is quoted
    if is_known and "regular expression" not in problems[0] and value not in ([], None):
        assert json.dumps(value) in problems[0]


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("layer_replication", [[0, 2], [1, 2]], "Merge the adapter into its base"),
        ("alora_invocation_tokens", [5, 7], "Train without it"),
        ("use_qalora", True, "or train without it"),
        ("use_bdlora", {"nblocks": 2}, "Merge the adapter into its base"),
        ("arrow_config", {"top_k": 3}, "Serve one, or a blend"),
        ("kasa_config", {"beta": 1e-4}, "Merge the adapter into its base"),
        ("megatron_config", {"tensor_model_parallel_size": 2}, "Save it again without Megatron"),
        ("init_lora_weights", "pissa", "Save it again with path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "Merge the adapter into its base"),
        ("init_lora_weights", "newest", "Those that are known not to: true, false, gaussian"),
        ("peft_type", "IA3", "Merge the adapter into its base"),
    ],
)
def test_a_refusal_says_the_value_and_what_to_do(tmp_path: Path, field: str, value: Any, advice: str) -> None:
    (problem,) = _problems(fixtures.changed(tmp_path / "a", "plain", {field: value}))
    assert json.dumps(value) in problem
    assert advice in problem


@pytest.mark.parametrize(
    ("fields", "named", "reason"),
    [
        ({"target_modules": "q", "layers_to_transform": 1}, "layers_to_transform", "regular expression"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias", "cannot be used with use_dora"),
        ({"target_parameters": ["x"], "use_dora": True}, "use_dora", "target_parameters"),
        ({"target_parameters": ["x"], "lora_bias": True}, "lora_bias", "target_parameters"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    tmp_path: Path, fields: dict[str, Any], named: str, reason: str
) -> None:
    problems = _problems(fixtures.changed(tmp_path / "a", "plain", fields))
    assert len(problems) == 1
    assert problems[0].startswith(f"adapter_config.json: {named}: ")
    assert reason in problems[0]


def test_unknown_fields_that_say_nothing_and_training_fields_do_no_harm(tmp_path: Path) -> None:
    fields = {
        "from_next_year": None,
        "also_new": False,
        "and_this": {},
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "velora_config": {"num_groups": 64},
        "eva_config": {"rho": 2.0},
        "task_type": None,
        "revision": "main",
    }
    container = AdapterContainer.from_directory(fixtures.changed(tmp_path / "a", "plain", fields))
    assert container.ignored_fields == (
        "eva_config",
        "init_lora_weights",
        "lora_dropout",
        "revision",
        "velora_config",
    )
    assert (container.format, container.type, container.base_name) == ("peft", "lora", "tiny/llama")
    plain = AdapterContainer.from_directory(fixtures.adapter("plain"))
    assert plain.ignored_fields == ()
    assert plain.digest == container.digest


def test_all_problems_of_both_files_are_listed_at_once(tmp_path: Path) -> None:
    fields = {"modules_to_save": [3], "use_qalora": True, "r": 0, "unheard_of": 1}
    folder = fixtures.changed(tmp_path / "a", "plain", fields, _with("x", mx.array([mx.nan, 1.0])))
    problems = "\n".join(_problems(folder))
    for part in (*fields, "tensor x: expected finite values, 1 of 2"):
        assert part in problems
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: expected a file of this name" in "\n".join(_problems(folder))


def _with(name: str, value: mx.array) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("name", "fields", "change", "expected"),
    [
        (
            "plain",
            {},
            _without(f"{Q0}.lora_B.weight"),
            ["0.self_attn.q_proj.lora_B: expected shape (32, 4)"],
        ),
        (
            "plain",
            {},
            _without(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"),
            ["module model.layers.0.self_attn.q_proj: expected tensors, the file has none"],
        ),
        ("plain", {"r": 3}, None, ["expected shape (3, 32) (rank 3), got (4, 32)"]),
        (
            "plain",
            {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
            None,
            [
                f"tensor {Q0}.lora_A.weight: expected shape (2, 32)",
                f"tensor {Q0}.lora_B.weight: expected shape",
            ],
        ),
        (
            "plain",
            {"target_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
            None,
            [f"tensor {Q0}.lora_A.weight: not expected: adapter_config.json leaves module model.layers.0"],
        ),
        ("plain", {"use_dora": True}, None, ["q_proj.lora_magnitude_vector: expected shape (32,)"]),
        ("plain", {"lora_bias": True}, None, ["q_proj.lora_B.bias: expected shape (32,)"]),
        ("dora", {"use_dora": False}, None, ["a magnitude, but adapter_config.json does not say use_dora"]),
        ("bias", {"lora_bias": False}, None, ["does not say lora_bias"]),
        (
            "plain",
            {},
            _with(f"{Q0}.lora_A.second.weight", mx.zeros((4, 32))),
            ["is the same factor; a file holds one adapter"],
        ),
        (
            "plain",
            {},
            lambda tensors: tensors | {Q0.replace("layers.0", "layers.7") + ".lora_A.weight": mx.ones(4)},
            ["the model has no module model.layers.7.self_attn.q_proj"],
        ),
        (
            "plain",
            {},
            _with("strange", mx.ones(3)),
            ["tensor strange: not expected"],
        ),
        ("tokens", {"trainable_token_indices": None}, None, ["leaves module model.embed_tokens out"]),
        (
            "tokens",
            {"trainable_token_indices": [1, 2]},
            None,
            ["expected shape (2, 32) (rank 2)"],
        ),
        ("tokens", {"trainable_token_indices": [1, 2, 64]}, None, ["expected different tokens below 64"]),
        ("tokens", {"trainable_token_indices": [1, 2, 2]}, None, ["expected different tokens below 64"]),
        (
            "tokens-tied",
            {"trainable_token_indices": {"embed_tokens": [9, 5, 33], "lm_head": [5, 9]}},
            _with("base_model.model.lm_head.token_adapter.trainable_tokens_delta", mx.zeros((2, 32))),
            ["trainable_tokens_delta: not expected: the model's head is tied to its embedding"],
        ),
        (
            "tokens",
            {"trainable_token_indices": list(range(257))},
            None,
            ["257 trained tokens; up to 256 can be served. Merge the adapter into its base"],
        ),
        (
            "plain",
            {"trainable_token_indices": {"q_proj": [1]}, "exclude_modules": ["q_proj"]},
            lambda tensors: (
                {name: value for name, value in tensors.items() if "q_proj" not in name}
                | {
                    f"base_model.model.model.layers.{layer}.self_attn.q_proj.token_adapter"
                    ".trainable_tokens_delta": mx.zeros((1, 32))
                    for layer in range(2)
                }
            ),
            ["which has a bias, and PEFT leaves the bias out where tokens were trained"],
        ),
        ("plain", {"trainable_token_indices": [1]}, None, ["module model.embed_tokens: expected tensors"]),
        ("lookup-dora", {"ensure_weight_tying": True}, None, ["PEFT scales the embedding's features"]),
        (
            "embedding",
            {"lora_bias": True},
            None,
            ["lora_embedding_A: not expected: PEFT has no bias (lora_bias) for embeddings"],
        ),
        (
            "experts-qwen3",
            {"target_parameters": [], "target_modules": ["gate_proj"]},
            lambda tensors: {
                "base_model.model.model.layers.0.mlp.switch_mlp.gate_proj.lora_A.weight": mx.ones((2, 32))
            },
            ["mlp.switch_mlp.gate_proj that can be adapted"],
        ),
        (
            "tied",
            {},
            _with("base_model.model.lm_head.lora_A.weight", mx.ones((4, 32))),
            ["the model's head is tied to its embedding"],
        ),
        ("tied", {"alpha_pattern": {"lm_head": 3}}, None, ["another rank or scale by rank_pattern or alpha"]),
        (
            "experts-qwen3",
            {"target_parameters": ["mlp.experts.down_proj"]},
            None,
            ["mlp.experts.base_layer.lora_A.weight: not expected: adapter_config.json leaves it out"],
        ),
        ("experts-qwen3", {"peft_version": "0.18.1"}, None, ["laid out in other ways before PEFT 0.20"]),
        ("experts-qwen3", {"peft_version": None}, None, ["laid out in other ways before PEFT 0.20"]),
        (
            "experts-down",
            {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
            None,
            ["parameter model.layers.0.mlp.experts.gate_up_proj: expected tensors"],
        ),
        (
            "experts-down",
            {},
            lambda tensors: {name: value for name, value in tensors.items() if "layers.0" in name},
            ["parameter model.layers.1.mlp.experts.down_proj: expected tensors"],
        ),
        (
            "modules-qwen3",
            {},
            lambda tensors: {name: value for name, value in tensors.items() if ".experts.2.up" not in name},
            ["module model.layers.0.mlp.experts.2.up_proj: expected tensors, the file has none"],
        ),
        (
            "modules-qwen3",
            {},
            lambda tensors: {
                name.replace("experts.3.", "experts.9."): value for name, value in tensors.items()
            },
            ["mlp.experts.9.up_proj.lora_A.weight: not expected: the model has 4 experts"],
        ),
        (
            "modules-qwen3",
            {"use_dora": True},
            None,
            ["use_dora of an expert is not supported; train without"],
        ),
        (
            "modules-qwen3",
            {"exclude_modules": ["experts.1.up_proj"]},
            None,
            ["experts.1.up_proj.lora_A.weight: not expected: adapter_config.json leaves module model"],
        ),
        (
            "experts-down",
            {"r": 3},
            None,
            ["experts.lora_A.weight: expected shape (12, 24) (rank 3), got (8, 24)"],
        ),
        (
            "plain",
            {},
            _with(f"{Q0}.token_adapter.trainable_tokens_delta", mx.zeros((1, 32))),
            ["rows of single tokens, and adapter_config.json has none for this module"],
        ),
        (
            "plain",
            {},
            _with(f"{Q0}.lora_embedding_A", mx.zeros((4, 32))),
            ["q_proj.lora_embedding_A: not expected: not a factor of a module of this kind"],
        ),
        (
            "plain",
            {},
            _with(f"{Q0}.lora_diag", mx.zeros(4)),
            ["q_proj.lora_diag: not expected: singular values of KaSA"],
        ),
        (
            "saved",
            {"target_modules": ["nothing"]},
            lambda tensors: {name: value for name, value in tensors.items() if "lora" not in name},
            ["expected tensors of an adapter, the file has none"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    change: Callable[[Tensors], Tensors] | None,
    expected: list[str],
) -> None:
    folder = fixtures.changed(tmp_path / "a", name, fields, change)
    problems = "\n".join(_problems(folder, fixtures.base_of(name)))
    for part in expected:
        assert part in problems


def test_another_base_is_refused_with_every_tensor(tmp_path: Path) -> None:
    folder = fixtures.adapter("gpt2")
    problems = _problems(folder, "llama")
    names = json.dumps(problems)
    assert len(problems) >= 16
    assert "transformer.h.0.attn.c_attn" in names
    assert "transformer.h.1.mlp.c_proj" in names


def test_experts_of_a_model_whose_layout_is_not_known_are_refused() -> None:
    model = fixtures.model("qwen3_moe")
    model.model_type = "unheard_of"  # type: ignore[assignment]
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterContainer.from_directory(fixtures.adapter("experts-qwen3")).check(model)
    assert len(refused.value.problems) == 8
    for problem in refused.value.problems:
        assert "how the parameters of the experts of a unheard_of model lie is not known; merge" in problem


def test_buffers_of_training_methods_are_passed_over(tmp_path: Path) -> None:
    folder = fixtures.changed(tmp_path / "a", "plain", {}, _with(f"{Q0}.lora_velora_scale", mx.ones(1)))
    model = fixtures.model("llama")
    found = AdapterContainer.from_directory(folder).check(model)
    assert found.keys() == AdapterContainer.from_directory(fixtures.adapter("plain")).check(model).keys()


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            "plain",
            lambda tensors: {name: value for name, value in tensors.items() if name != f"{Q0}.lora_B.weight"},
            "tensor model.layers.0.self_attn.q_proj.lora_B: expected a matrix, the file has none",
        ),
        (
            "tokens",
            _with("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", mx.array(1.0)),
            "embed_tokens.token_adapter.trainable_tokens_delta: expected a matrix, got ()",
        ),
        (
            "plain",
            _with(f"{Q0}.lora_B.weight", mx.zeros((32, 3))),
            f"tensor {Q0}.lora_B.weight: expected shape (32, 4) (rank 4), got (32, 3)",
        ),
        (
            "plain",
            _with("base_model.model.model.layers.0.strange.lora_A.weight", mx.zeros((4, 32))),
            "leaves module model.layers.0.strange out (target_modules",
        ),
    ],
)
def test_what_is_wrong_without_a_model_is_seen_without_one(
    tmp_path: Path, name: str, change: Callable[[Tensors], Tensors], expected: str
) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        read_unplaced(fixtures.changed(tmp_path / "a", name, {}, change))
    assert expected in "\n".join(refused.value.problems)

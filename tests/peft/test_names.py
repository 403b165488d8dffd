"""Spellings of tensor names, places in other models, and PEFT's rules of matching."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError
from adapters_core.formats.peft.config import PeftConfig
from adapters_core.formats.peft.names import Leaf, TensorName, parse_name
from adapters_core.formats.peft.patterns import KeyPatterns, PatternError, compiled
from adapters_core.formats.peft.targets import is_target, is_target_parameter, rank_and_scale
from adapters_core.layers.module_weights import ModuleWeights
from tests.peft import fixtures

TOLERANCE = 1e-4


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(fixtures.tokens()).astype(mx.float32))


def _config(**fields: Any) -> PeftConfig:
    values = {"peft_type": "LORA", "target_modules": ["q_proj"]} | fields
    return PeftConfig.from_values(values, "test")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.q.lora_A.weight", TensorName("model.layers.0.q", Leaf.A)),
        ("model.layers.0.q.lora_B.weight", TensorName("model.layers.0.q", Leaf.B)),
        ("base_model.model.q.lora_B.default.weight", TensorName("q", Leaf.B)),
        ("base_model.model.q.lora_B.bias", TensorName("q", Leaf.BIAS)),
        ("base_model.model.q.lora_A.bias", None),
        ("base_model.model.e.lora_embedding_A", TensorName("e", Leaf.EMBEDDING_A)),
        ("base_model.model.e.lora_embedding_B.mine", TensorName("e", Leaf.EMBEDDING_B)),
        ("base_model.model.q.lora_magnitude_vector", TensorName("q", Leaf.MAGNITUDE)),
        ("base_model.model.q.lora_magnitude_vector.weight", TensorName("q", Leaf.MAGNITUDE)),
        ("base_model.model.q.lora_magnitude_vector.default", TensorName("q", Leaf.MAGNITUDE)),
        ("base_model.model.q.lora_magnitude_vector.default.weight", TensorName("q", Leaf.MAGNITUDE)),
        ("base_model.model.x.experts.base_layer.lora_A.weight", TensorName("x.experts", Leaf.A, 1)),
        (
            "base_model.model.x.experts.base_layer.base_layer.lora_B.weight",
            TensorName("x.experts", Leaf.B, 2),
        ),
        ("base_model.model.q.weight", None),
        ("lora_A.weight", None),
    ],
)
def test_tensor_names_in_every_spelling(name: str, expected: TensorName | None) -> None:
    assert parse_name(name) == expected


def _respelled(old: str, new: str) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
    return lambda tensors: {re.sub(old, new, name): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "fields", "old", "new"),
    [
        ("dora", {}, r"(lora_[AB])\.weight$", r"\1.pirate.weight"),
        ("dora", {}, r"magnitude_vector$", r"magnitude_vector.weight"),
        ("dora", {}, r"magnitude_vector$", r"magnitude_vector.default.weight"),
        ("plain", {}, r"^base_model\.model\.", ""),
        # a multimodal model's, of transformers 5 and 4, on the language model alone
        ("plain", {}, r"base_model\.model\.model\.", "base_model.model.model.language_model."),
        ("plain", {}, r"base_model\.model\.model\.", "base_model.model.language_model.model."),
        (
            "regex",
            {"target_modules": r"model\.language_model\.layers\.1\.(self_attn\.[qo]|mlp\.down)_proj"},
            r"base_model\.model\.model\.",
            "base_model.model.model.language_model.",
        ),
        ("head", {}, r"base_model\.model\.(model\.)?", r"base_model.model.language_model.\1"),
        # a decoder's without its head
        ("plain", {}, r"base_model\.model\.model\.", "base_model.model."),
    ],
)
def test_files_with_other_names_for_the_same_modules(
    tmp_path: Path, name: str, fields: dict[str, Any], old: str, new: str
) -> None:
    folder = fixtures.changed(tmp_path / "a", name, fields, _respelled(old, new))
    model = fixtures.model(fixtures.base_of(name))
    AdapterContainer.from_directory(folder).load(into=model)
    np.testing.assert_allclose(_logits(model), fixtures.expected(name), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({}, "model.layers.0.self_attn.q_proj", True),
        ({}, "q_proj", True),
        ({}, "model.layers.0.self_attn.aq_proj", False),
        ({"target_modules": ["attn.q_proj"]}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": "q_proj"}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": r".*\.q_proj"}, "model.layers.0.self_attn.q_proj", True),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "model.layers.0.self_attn.q_proj", False),
        ({"exclude_modules": r"layers\.0.*"}, "model.layers.0.self_attn.q_proj", True),
        ({"layers_to_transform": 1}, "model.layers.0.self_attn.q_proj", False),
        ({"layers_to_transform": 1}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": []}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": [1]}, "q_proj", True),
        ({"layers_to_transform": [1]}, "other.q_proj", False),
        ({"layers_to_transform": [1]}, "model.layers.1.experts.0.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, "model.layers.1.a.q_proj", False),
        (
            {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
            "model.layers.1.a.q_proj",
            True,
        ),
        ({"layers_to_transform": [1], "layers_pattern": "model|h"}, "model.layers.1.a.q_proj", False),
        ({"target_modules": "all-linear"}, "model.layers.1.anything", True),
        ({"target_modules": "ALL-linear", "exclude_modules": ["anything"]}, "model.layers.1.anything", False),
    ],
)
def test_targets_follow_pefts_rules(fields: dict[str, Any], name: str, expected: bool) -> None:
    assert is_target(_config(**fields).fields, name, is_linear=True) is expected


def test_all_linear_leaves_out_the_head_and_what_is_not_linear() -> None:
    fields = _config(target_modules="all-linear").fields
    assert not is_target(fields, "lm_head", is_linear=True, is_head=True)
    assert not is_target(fields, "model.embed_tokens", is_linear=False)


def test_parameters_are_matched_in_full_or_by_their_end() -> None:
    fields = _config(target_modules=[], target_parameters=["experts.down_proj"]).fields
    assert is_target_parameter(fields, "model.layers.0.mlp.experts.down_proj")
    assert not is_target_parameter(fields, "model.layers.0.mlp.shared_experts.down_proj")
    assert not is_target(fields, "model.layers.0.mlp.down_proj", is_linear=True)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"r": 4, "lora_alpha": 6}, "a.q_proj", (4, 1.5)),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, "a.q_proj", (4, 3.0)),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}}, "a.q_proj", (2, 3.0)),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"proj": 2}}, "a.q_proj", (4, 1.5)),
        ({"r": 4, "rank_pattern": {"^q_proj": 2}, "lora_alpha": 4}, "a.q_proj", (4, 1.0)),
        ({"r": 4, "rank_pattern": {r"^a\.q_proj": 2}, "lora_alpha": 4}, "a.q_proj", (2, 2.0)),
        ({"r": 4, "rank_pattern": {"a.*": 2, "q_proj": 8}, "lora_alpha": 4}, "a.q_proj", (2, 2.0)),
        ({"r": 4, "alpha_pattern": {"q_proj": 10}, "lora_alpha": 4}, "a.q_proj", (4, 2.5)),
    ],
)
def test_ranks_and_scales_follow_the_first_pattern_that_matches(
    fields: dict[str, Any], name: str, expected: tuple[int, float]
) -> None:
    assert rank_and_scale(_config(**fields), name) == expected


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.mlp.down_proj",
    "model.layers.3.mlp.gate",
    "model.language_model.layers.12.self_attn.o_proj",
    "model.vision_tower.blocks.2.attn.q_proj",
    "language.mlp.up_proj.lora",
    "model.embed_tokens",
    "lm_head",
    "aab",
    "",
)


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r".*\.(q|v)_proj",
        r"model\.layers\.(0|1|\d{2})\.self_attn\.[qkvo]_proj",
        r"^(?:model\.)?.*(?P<part>mlp|self_attn)\.\w+$",
        r"(?i)MODEL\.EMBED_TOKENS",
        r"[^.]+(\.[a-z]+_?[a-z]*)?",
        r"(a|a)+b",
        r"(a*)*b?",
        "lm.head|aab",
    ],
)
def test_expressions_match_what_pythons_do(pattern: str) -> None:
    expected = [re.fullmatch(pattern, path) is not None for path in PATHS]
    assert [compiled(pattern).fullmatch(path) is not None for path in PATHS] == expected
    assert any(expected)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(?:[\w.]{0,16}[\w.]{0,16}){0,16}!", "model.layers.0.self_attn.q_proj"),
        (r"(a{0,16}){0,16}b", "a" * 200),
        (r"(a+)+b", "a" * 200),
        (".*" * 40 + "!", "model.layers.0.self_attn.q_proj" * 10),
    ],
)
def test_no_expression_takes_longer_than_its_text(pattern: str, text: str) -> None:
    start = time.perf_counter()
    found = compiled(pattern)
    assert found.fullmatch(text) is None
    assert found.match(text) is None
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(?!lm_head).*", r"look-around, .* \(invalid perl operator: \(\?!\)"),
        (r"(a)\1", "a backreference"),
        (r".*(?<=q)_proj", "look-around"),
        (r"((a{0,16}){0,16}){0,16}b", r"a thousand repetitions \(invalid repetition size: \{0,16\}\)"),
        (r"(?:\w{30}[a-z]{900}){30}", "RE2 does not have"),
        ("a{,3}", "engines differ in"),
        ("[[:alpha:]]", "engines differ in"),
        ("(", "expected a regular expression, got"),
        ("x{99999999999}", "expected a regular expression, got"),
        (r"\pL", "expected a regular expression, got"),
        ("a" * 4097, "at most 4096 characters"),
    ],
)
def test_expressions_that_cannot_be_matched_in_linear_time_are_refused(
    pattern: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PatternError, match=reason):
        compiled(pattern)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "key",
    ["q_proj", "^a.q_proj", r"a\.q_proj", "k_proj|q_proj", r"q_\w+", r"(?i)Q_PROJ", r"q_\x70roj", r".*\D"],
)
def test_keys_match_as_pefts_do(key: str) -> None:
    frame = r"(.*\.)?({})$"
    names = ("a.q_proj", "q_proj", "b.a.q_proj", "aq_proj", "k_proj", "a.q_proj.x", "a.7")
    try:
        expected = [re.match(frame.replace("{}", key), name) is not None for name in names]
    except re.error:
        assert KeyPatterns.of({key: 2}, frame).problems
        return
    assert [KeyPatterns.of({key: 2}, frame).value(name) == 2 for name in names] == expected


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="alpha_pattern: expected at most 2048 names"):
        _config(alpha_pattern={f"m{number}": 1 for number in range(2049)})


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 32, 8), ("mxfp4", 32, 4)]
)
def test_two_rows_that_were_trained_are_seen_on_a_quantised_base(
    tmp_path: Path, mode: str, group_size: int, bits: int
) -> None:
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    model = fixtures.model("llama")
    nn.quantize(
        model, group_size, bits, mode=mode, class_predicate=lambda path, _: path == "model.embed_tokens"
    )

    def trained(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        weight = mx.array(tensors[name])
        weight[62:] = weight[62:] * 1.3
        return tensors | {name: weight}

    whole = AdapterContainer.from_directory(fixtures.adapter("embedding"))
    assert "model.embed_tokens" in whole.check(model)
    changed = AdapterContainer.from_directory(fixtures.changed(tmp_path / "a", "embedding", None, trained))
    with pytest.raises(InvalidAdapterError, match=r"embed_tokens\.base_layer\.weight: .* not the base's"):
        changed.check(model)


def test_magnitudes_in_some_modules_only_are_refused_by_name() -> None:
    model = fixtures.model("llama")
    weights = dict(AdapterContainer.from_directory(fixtures.adapter("dora")).check(model))
    path = min(weights)
    weights[path] = ModuleWeights(weights[path].lora_a, weights[path].lora_b, None, 1.0)
    with pytest.raises(InvalidAdapterError, match=re.escape(path)) as refused:
        AdapterContainer.from_weights(weights, "mix").load(into=model)
    assert len(refused.value.problems) == 1
    assert "it has no magnitudes and others have" in refused.value.problems[0]


def test_a_copy_of_the_bases_own_weight_is_no_problem_on_a_quantised_base(tmp_path: Path) -> None:
    folder = fixtures.adapter("embedding")  # holds both embeddings of the base, as PEFT saves them
    model = fixtures.model("llama")
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path in ("lm_head", "model.embed_tokens"))
    container = AdapterContainer.from_directory(folder)
    assert len(container.check(model)) == 4

    def other(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        name = "base_model.model.model.embed_tokens.base_layer.weight"
        return tensors | {name: mx.random.normal((64, 32), key=mx.random.key(0))}

    changed = AdapterContainer.from_directory(fixtures.changed(tmp_path / "a", "embedding", None, other))
    with pytest.raises(InvalidAdapterError, match=r"embed_tokens\.base_layer\.weight: .* not the base's"):
        changed.check(model)


def test_modules_by_path_make_an_adapter_of_their_own() -> None:
    model = fixtures.model("llama")
    read = AdapterContainer.from_directory(fixtures.adapter("patterns"))
    weights = read.check(model)
    made = AdapterContainer.from_weights(weights, "blend")
    made.load(into=model)
    np.testing.assert_allclose(_logits(model), fixtures.expected("patterns"), atol=TOLERANCE, rtol=0)
    made.unload(from_=model)
    assert made.format == "mlx"
    assert made.digest == AdapterContainer.from_weights(weights, "again").digest
    path = min(weights)
    changed = {**weights, path: ModuleWeights(weights[path].lora_a, weights[path].lora_b, None, 9.0)}
    assert made.digest != AdapterContainer.from_weights(changed, "other scale").digest
    with pytest.raises(ContainerStateError, match="no config in mlx-lm's format"):
        _ = made.config


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("model.layers.9.self_attn.q_proj", "the model has no module"),
        ("model.norm", "a RMSNorm cannot be adapted"),
        ("model.layers.0.mlp.up_proj", r"lora_b: expected shape \(4, 48\), got \(4, 32\)"),
    ],
)
def test_modules_by_path_that_do_not_fit_are_refused(path: str, part: str) -> None:
    weights = {path: ModuleWeights(mx.zeros((32, 4)), mx.zeros((4, 32)), None, 1.0)}
    with pytest.raises(InvalidAdapterError, match=part):
        AdapterContainer.from_weights(weights, "blend").check(fixtures.model("llama"))


def test_what_training_changes_in_a_loaded_folder_is_kept() -> None:
    model = fixtures.model("llama")
    container = AdapterContainer.from_directory(fixtures.adapter("dora"))
    before = container.digest
    container.load(into=model)
    assert container.digest == before
    layer = dict(model.named_modules())["model.layers.0.self_attn.q_proj"]
    layer.lora_b = layer.lora_b * 2
    changed = _logits(model)
    assert container.digest != before
    container.unload(from_=model)
    container.load(into=model)
    np.testing.assert_array_equal(_logits(model), changed)


def test_a_rank_for_every_module_of_a_large_model_is_found_in_no_time() -> None:
    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(100) for part in "abcdefgh"]
    config = _config(rank_pattern={re.escape(name): 1 + number for number, name in enumerate(names)})
    start = time.perf_counter()
    assert [rank_and_scale(config, name)[0] for name in names] == list(range(1, 801))
    assert time.perf_counter() - start < 10

"""Whole weights in PEFT files: copies of the base's, rows that become trained tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.peft.tokens import row_weights
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.mixed.residents import make_row
from adapters_core.mixed.routing import AdapterRows, Routing
from tests.models import snapshot
from tests.peft import fixtures

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
BASE = "base_model.model."
Tensors = dict[str, mx.array]


def _container(name: str) -> AdapterContainer:
    return AdapterContainer.from_directory(fixtures.adapter(name))


def test_copies_of_the_base_are_passed_over_and_told_in_the_report() -> None:
    model = fixtures.model("llama")
    container = _container("saved")
    assert all("q_proj" in path for path in container.check(model))
    report = AdapterBank(model, Routing()).add(container).report
    assert report is not None
    (warning,) = report.warnings
    assert "no other than the base's own" in warning
    assert "7 module(s): lm_head, model.embed_tokens, model.layers.0.input_layernorm" in warning


def test_rows_that_were_trained_become_factors_of_embedding_and_head() -> None:
    mapped = _container("saved-rows").place(fixtures.model("llama"))
    assert (mapped.weights[EMBEDDING].rank, mapped.weights[HEAD].rank) == (2, 3)
    assert [warning.split(", and ")[1].split(";")[0] for warning in mapped.warnings] == [
        "3 of its 64 rows are not the base's",
        "2 of its 64 rows are not the base's",
    ]


@pytest.mark.parametrize(("name", "lookup_only"), [("saved-lookup", True), ("saved-tied", False)])
def test_a_tied_head_follows_the_embedding_where_peft_ties_it(name: str, lookup_only: bool) -> None:
    weights = _container(name).check(fixtures.model("qwen3"))[EMBEDDING]
    assert (weights.rank, weights.lookup_only) == (3, lookup_only)


def test_rows_of_a_quantised_base_become_what_the_file_has(tmp_path: Path) -> None:
    model = fixtures.model("llama")
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path in (HEAD, EMBEDDING))
    before = snapshot(model)
    container = _container("saved-rows")
    assert (container.check(model)[EMBEDDING].rank, container.check(model)[HEAD].rank) == (2, 3)
    container.load(into=model)
    file = mx.load(str(fixtures.adapter("saved-rows") / "adapter_model.safetensors"))
    rows = dict(model.named_modules())[EMBEDDING](mx.array([5, 9]))
    wanted = np.array(file[f"{BASE}{EMBEDDING}.weight"])[[5, 9]]  # type: ignore[index]
    np.testing.assert_allclose(np.array(rows), wanted, atol=1e-5)
    container.unload(from_=model)
    assert snapshot(model) == before
    copies = fixtures.changed(tmp_path / "a", "saved")
    assert (
        "below the rounding of the quantised base"
        in AdapterContainer.from_directory(copies).place(model).warnings[0]
    )


def test_half_precision_copies_of_a_float32_base_are_copies(tmp_path: Path) -> None:
    def halved(tensors: Tensors) -> Tensors:
        return {
            name: value if "lora" in name else value.astype(mx.bfloat16) for name, value in tensors.items()
        }

    folder = fixtures.changed(tmp_path / "a", "saved", None, halved)
    assert all(
        "q_proj" in path for path in AdapterContainer.from_directory(folder).check(fixtures.model("llama"))
    )


def _with(name: str, change: Callable[[Tensors], mx.array]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {BASE + name: change(tensors)}


def _times(name: str, factor: float, rows: slice = slice(None)) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> mx.array:
        value = mx.array(tensors[BASE + name])
        value[rows] = value[rows] * factor
        return value

    return _with(name, change)


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("name", "fields", "change", "expected"),
    [
        ("saved", {}, _times("lm_head.weight", 1.5), "64 of its 64 rows differ, and up to 32 can be served"),
        ("saved", {}, _times("lm_head.weight", 1.5), "Train with trainable_token_indices, or merge"),
        ("saved", {}, _times("model.norm.weight", 1.5), "a RMSNorm has no rows that could be"),
        (
            "saved",
            {},
            _with("lm_head.weight", lambda _: mx.zeros((66, 32))),
            "shape (66, 32), where the base has (64, 32); all rows of a batch share the base. If the voc",
        ),
        ("saved", {}, _without("model.norm"), "module model.norm: expected its weight, the file has none"),
        (
            "saved",
            {"modules_to_save": ["embed_tokens", "lm_head", "norm", "o_proj"]},
            None,
            "module model.layers.0.self_attn.o_proj: expected its weight",
        ),
        (
            "saved",
            {"modules_to_save": ["embed_tokens", "lm_head", "norm", "q_proj"]},
            None,
            "q_proj.lora_A.weight: not expected: adapter_config.json leaves module model.layers.0.self_attn",
        ),
        (
            "bias-all",
            {},
            _with("model.layers.0.mlp.up_proj.bias", lambda _: mx.ones(48)),
            "up_proj.bias: not expected: a bias that is not the base's: the base has none of this shape",
        ),
        (
            "bias-all",
            {},
            _with("model.layers.0.self_attn.o_proj.bias", lambda _: mx.ones(33)),
            "o_proj.bias: not expected: a bias that is not the base's: the base has none of this shape",
        ),
        (
            "dora",
            {"bias": "all"},
            _with("model.layers.0.self_attn.q_proj.base_layer.bias", lambda _: mx.ones(32)),
            "q_proj.base_layer.bias: not expected: a bias that is not the base's: beside use_dora none can",
        ),
        (
            "gpt2",
            {"bias": "all"},
            _with("transformer.h.0.ln_1.bias", lambda _: mx.ones(32)),
            "ln_1.bias: not expected: a bias that is not the base's: a LayerNorm can have no other bias",
        ),
        (
            "saved",
            {},
            _with("lm_head.original_module.weight", lambda _: mx.ones((64, 32))),
            "lm_head.original_module.weight: not expected: a weight that is not the base's, named as one",
        ),
        (
            "saved",
            {},
            _with("lm_head.modules_to_save.default.weight", lambda _: mx.ones((64, 32))),
            "is another weight of the same module",
        ),
        (
            "bias-all",
            {},
            _with("model.layers.0.self_attn.k_proj.modules_to_save.bias", lambda _: mx.ones(32)),
            "k_proj.bias is another bias of the same module",
        ),
        (
            "bias-all",
            {},
            _with("model.layers.0.self_attn.k_proj.original_module.bias", lambda _: mx.ones(32)),
            "k_proj.original_module.bias: not expected: a bias that is not the base's, named as one",
        ),
        (
            "saved-tied",
            {},
            _times("lm_head.weight", 2),
            "model.embed_tokens.weight is another weight, and embedding and head share theirs",
        ),
        (
            "saved",
            {},
            _with("model.layers.9.input_layernorm.weight", lambda _: mx.ones(32)),
            "of a module that the model does not have",
        ),
        (
            "embedding",
            {},
            _times("model.embed_tokens.base_layer.weight", 1.5, slice(2)),
            "2 of its 64 rows differ, and the file has factors for this module as well",
        ),
        (
            "plain",
            {},
            _with("model.embed_tokens.weight", lambda _: mx.zeros((64, 32))),
            "64 of its 64 rows differ, and up to 32 can be served beside the base; it was trained, or bel",
        ),
        (
            "saved-lookup",
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            None,
            "module lm_head: expected its weight, the file has none",
        ),
        (
            "saved-lookup",
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            _with("lm_head.weight", lambda tensors: tensors[f"{BASE}model.embed_tokens.weight"] * 2),
            "the head is tied to the embedding model.embed_tokens, so that it cannot have rows of its own",
        ),
        (
            "saved-lookup",
            {"modules_to_save": None},
            _with("lm_head.weight", lambda tensors: tensors[f"{BASE}model.embed_tokens.weight"] * 2),
            "model.embed_tokens.weight is another weight, and embedding and head share theirs",
        ),
    ],
)
def test_what_is_neither_is_refused_with_how_much_differs(
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    change: Callable[[Tensors], Tensors] | None,
    expected: str,
) -> None:
    model = fixtures.model(fixtures.base_of(name))
    before = snapshot(model)
    container = AdapterContainer.from_directory(fixtures.changed(tmp_path / "a", name, fields, change))
    with pytest.raises(InvalidAdapterError) as refused:
        container.load(into=model)
    assert expected in "\n".join(refused.value.problems)
    assert snapshot(model) == before


def test_a_plain_copy_changes_what_a_tied_pair_shares(tmp_path: Path) -> None:
    folder = fixtures.changed(tmp_path / "a", "saved-tied", {"modules_to_save": None})
    head_only = fixtures.changed(
        tmp_path / "b", "saved-tied", {"modules_to_save": None}, _without("embed_tokens")
    )
    for one in (folder, head_only):
        model = fixtures.model("qwen3")
        AdapterContainer.from_directory(one).load(into=model)
        logits = np.array(model(fixtures.tokens()))
        np.testing.assert_allclose(logits, fixtures.expected("saved-tied"), atol=1e-4, rtol=0)


def test_a_head_that_was_saved_whole_and_not_trained_leaves_the_embedding_alone(tmp_path: Path) -> None:
    weight = mx.array(np.array(fixtures.model("qwen3").model.embed_tokens.weight))  # type: ignore[union-attr]
    fields = {"modules_to_save": ["embed_tokens", "lm_head"]}
    folder = fixtures.changed(
        tmp_path / "a", "saved-lookup", fields, _with("lm_head.weight", lambda _: weight)
    )
    model = fixtures.model("qwen3")
    AdapterContainer.from_directory(folder).load(into=model)
    logits = np.array(model(fixtures.tokens()))
    np.testing.assert_allclose(logits, fixtures.expected("saved-lookup"), atol=1e-4, rtol=0)


def test_a_copy_of_a_tied_head_is_told_in_the_report(tmp_path: Path) -> None:
    model = fixtures.model("qwen3")
    weight = mx.array(np.array(dict(model.named_modules())[EMBEDDING].weight))
    folder = fixtures.changed(
        tmp_path / "a",
        "saved-lookup",
        {"modules_to_save": ["lm_head"]},
        lambda tensors: (
            {name: value for name, value in tensors.items() if "embed_tokens" not in name}
            | {f"{BASE}lm_head.weight": weight}
        ),
    )
    mapped = AdapterContainer.from_directory(folder).place(model)
    assert EMBEDDING not in mapped.weights
    assert mapped.warnings == (
        "Saved whole (modules_to_save) and no other than the base's own, so that nothing is served of 1 "
        "module(s): lm_head.",
    )


def test_biases_that_were_trained_become_the_adapters_own() -> None:
    mapped = _container("bias-all").place(fixtures.model("llama"))
    layer = "model.layers.0.self_attn"
    with_bias = [path for path, one in mapped.weights.items() if one.bias is not None]
    assert len(with_bias) == 8
    assert not mx.any(mapped.weights[f"{layer}.k_proj"].lora_b).item()
    assert mx.any(mapped.weights[f"{layer}.q_proj"].lora_b).item()
    assert mapped.warnings == (
        f"The file has 8 bias(es) that are not the base's, the first of {layer}.k_proj; they are served as "
        "the adapter's own.",
    )


def test_a_trained_bias_is_kept_where_the_scale_is_zero(tmp_path: Path) -> None:
    model = fixtures.model("llama")
    folder = fixtures.changed(tmp_path / "a", "bias-all", {"lora_alpha": 0})
    path = "model.layers.0.self_attn.q_proj"
    weights = AdapterContainer.from_directory(folder).check(model)[path]
    file = mx.load(str(folder / "adapter_model.safetensors"))
    new = file[f"{BASE}{path}.base_layer.bias"]  # type: ignore[index]
    assert weights.bias is not None
    assert not mx.any(weights.lora_b).item()
    own = dict(model.named_modules())[path].bias
    np.testing.assert_allclose(np.array(own + weights.scale * weights.bias), np.array(new), atol=1e-6)


def test_originals_and_second_names_of_the_same_weight_change_nothing(tmp_path: Path) -> None:
    model = fixtures.model("qwen3")
    weight = mx.array(np.array(dict(model.named_modules())[EMBEDDING].weight))
    names = {f"{BASE}{name}.original_module.weight": weight for name in (HEAD, EMBEDDING)}

    def more(tensors: Tensors) -> Tensors:
        return (
            tensors
            | names
            | {f"{BASE}{HEAD}.modules_to_save.default.weight": tensors[f"{BASE}{HEAD}.weight"]}
        )

    folder = fixtures.changed(tmp_path / "a", "saved-tied", None, more)
    AdapterContainer.from_directory(folder).load(into=model)
    logits = np.array(model(fixtures.tokens()))
    np.testing.assert_allclose(logits, fixtures.expected("saved-tied"), atol=1e-4, rtol=0)
    twice = fixtures.changed(
        tmp_path / "b",
        "bias-all",
        None,
        lambda tensors: tensors | {name.replace(".base_layer", ""): value for name, value in tensors.items()},
    )
    model = fixtures.model("llama")
    AdapterContainer.from_directory(twice).load(into=model)
    logits = np.array(model(fixtures.tokens()))
    np.testing.assert_allclose(logits, fixtures.expected("bias-all"), atol=1e-4, rtol=0)


def test_rows_of_a_half_precision_base_are_as_exact_in_mixed_rows_as_alone() -> None:
    model: Any = fixtures.model("llama")
    model.set_dtype(mx.bfloat16)
    new = (0.2 * mx.random.normal((32, 32), key=mx.random.key(0))).astype(mx.bfloat16)
    weights = {
        EMBEDDING: row_weights(model.model.embed_tokens, range(32), new, is_dora=False),
        # The scale of other modules is no power of two: what is taken out of all rows must not round them.
        "model.layers.0.self_attn.q_proj": ModuleWeights(
            mx.ones((32, 1), mx.bfloat16), mx.ones((1, 32), mx.bfloat16), None, 1.7
        ),
    }
    container = AdapterContainer.from_weights(weights, "rows")
    routing = Routing()
    bank = AdapterBank(model, routing)
    rows = AdapterRows([make_row([(bank.add(container), 1.0)])])
    routing.plan = rows.plan(routing)
    mixed = model.model.embed_tokens(mx.arange(32)[None])[0]
    routing.plan = None
    bank.close()
    container.load(into=model)
    alone = model.model.embed_tokens(mx.arange(32))
    wanted = np.array(new.astype(mx.float32))
    for found in (alone, mixed):
        error = np.linalg.norm(np.array(found.astype(mx.float32)) - wanted) / np.linalg.norm(wanted)
        assert error < 3e-3

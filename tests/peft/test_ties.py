"""Which embedding is a head as well, and where PEFT gives a head the factors of its embedding: by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.peft.config import PeftConfig
from adapters_core.formats.peft.heads import tied_embedding
from adapters_core.formats.peft.ties import saved_are_tied, targets_are_tied
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from tests.peft import fixtures

WTE, WPE = "model.wte", "model.wpe"


def _fields(**fields: Any) -> Any:
    values = {"peft_type": "LORA", "ensure_weight_tying": True, "target_modules": ["q_proj"]} | fields
    return PeftConfig.from_values(values, "test").fields


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["model.embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": False}, False),
        ({"target_modules": ["wte"]}, False),
        ({"target_modules": ["embed_tokens.x"]}, False),
        ({"target_modules": ".*embed_tokens"}, True),
        ({"target_modules": r"model\.embed_tokens"}, False),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["norm"]}, True),
    ],
)
def test_targets_are_tied_by_the_names_that_peft_knows(fields: dict[str, Any], expected: bool) -> None:
    assert targets_are_tied(_fields(**fields)) is expected


def test_saved_modules_are_tied_by_the_same_names() -> None:
    assert saved_are_tied(_fields(modules_to_save=["model.embed_tokens"]))
    assert not saved_are_tied(_fields(modules_to_save=["wte"]))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"model.embed_tokens": nn.Embedding(8, 4)}, "model.embed_tokens"),
        ({"model.embed_tokens": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 9)}, None),
        ({"model.tok_embeddings": nn.Embedding(8, 4), "output": nn.Linear(4, 8)}, None),
        (
            {"model.tok_embeddings": nn.Embedding(8, 4), "model.layers.0.up_proj": nn.Linear(4, 8)},
            "model.tok_embeddings",
        ),
        ({"wpe": nn.Embedding(16, 4), "wte": nn.Embedding(8, 4)}, "wte"),
        ({"table": nn.Embedding(8, 4)}, "table"),
        ({"table": nn.Embedding(8, 4), "positions": nn.Embedding(8, 4)}, None),
        ({"model.embed_tokens": nn.QuantizedEmbedding(64, 64, 64, 4), "out": nn.Linear(64, 64)}, None),
    ],
)
def test_the_embedding_that_is_the_head_as_well(modules: dict[str, nn.Module], expected: str | None) -> None:
    assert tied_embedding(modules) == expected


@pytest.mark.parametrize(
    ("name", "path", "lookup_only"),
    [
        ("tied-by-another-name", WTE, True),
        ("tied-past-an-expression", "model.embed_tokens", True),
        ("tied-in-an-expression", "model.embed_tokens", False),
        ("positions", WPE, False),
    ],
)
def test_a_head_follows_its_embedding_where_it_does_in_peft(name: str, path: str, lookup_only: bool) -> None:
    model = fixtures.model(fixtures.base_of(name))
    weights = AdapterContainer.from_directory(fixtures.adapter(name)).check(model)
    assert weights[path].lookup_only is lookup_only


def test_an_embedding_that_is_no_head_is_written_in_mlx_lms_format_and_fused(tmp_path: Path) -> None:
    model = fixtures.model("gpt2")
    container = AdapterContainer.from_directory(fixtures.adapter("positions"))
    write_adapter(tmp_path / "a", container.check(model), "mlx", model)
    for one in (AdapterContainer.from_directory(tmp_path / "a"), container):
        fusion = one.fuse(with_=model, precision="dequantize")
        logits = np.array(model(fixtures.tokens()))
        np.testing.assert_allclose(logits, fixtures.expected("positions"), atol=1e-4, rtol=0)
        fusion.undo()


def test_a_tied_embedding_of_another_name_is_written_so_that_peft_ties_it(tmp_path: Path) -> None:
    model = fixtures.model("gpt2")
    found = AdapterContainer.from_directory(fixtures.adapter("tied-by-another-name")).check(model)
    for both in (True, False):
        folder = tmp_path / str(both)
        weights = {WTE: found[WTE], WPE: found[WTE]} if both else {WPE: found[WTE]}
        shapes = {WPE: (32, 2)}
        weights = {
            path: type(one)(one.lora_a[: shapes.get(path, (64, 2))[0]], one.lora_b, None, one.scale)
            for path, one in weights.items()
        }
        write_adapter(folder, weights, "peft", model)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["ensure_weight_tying"] is both
        assert ("lm_head" in config["target_modules"]) is both
        again = AdapterContainer.from_directory(folder).check(model)
        assert again.keys() == weights.keys()
        assert not any(one.lookup_only for one in again.values())


def test_factors_of_a_head_that_peft_leaves_out_are_refused_with_the_reason(tmp_path: Path) -> None:
    head = "base_model.model.lm_head.lora_{}.weight"
    embedding = "base_model.model.model.embed_tokens.lora_embedding_{}"
    folder = fixtures.changed(
        tmp_path / "a",
        "tied-past-an-expression",
        None,
        lambda tensors: (
            tensors
            | {head.format("A"): tensors[embedding.format("B")].T}
            | {head.format("B"): tensors[embedding.format("A")].T}
        ),
    )
    with pytest.raises(InvalidAdapterError, match="where target_modules name embed_tokens or lm_head"):
        AdapterContainer.from_directory(folder).check(fixtures.model("qwen3"))


def test_a_tied_head_of_another_rank_than_its_embedding_is_refused_with_that_reason(tmp_path: Path) -> None:
    fields = {"r": 3, "rank_pattern": {"embed_tokens": 2}}
    folder = fixtures.changed(
        tmp_path / "a",
        "tied-in-an-expression",
        fields,
        lambda tensors: {name: value for name, value in tensors.items() if "q_proj" not in name},
    )
    assert read_unplaced(folder).parts["lm_head"].rank == 2
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterContainer.from_directory(folder).check(fixtures.model("qwen3"))
    reasons = [problem for problem in refused.value.problems if "lm_head" in problem or "embed" in problem]
    assert len(reasons) == 4
    assert all("another rank or scale by rank_pattern or alpha_pattern" in reason for reason in reasons)

"""Names with parts of what a model was wrapped in, and targets with look-around: the adapter is the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.peft.config import PeftConfig
from adapters_core.formats.peft.names import unwrapped, unwrapped_pattern
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from tests.peft import fixtures

_WRAPPED = [
    (r"^", "_orig_mod."),
    (r"^", "module."),
    (r"^", "module.module._orig_mod."),
    (r"^base_model\.model\.", "base_model.model._orig_mod."),
    (r"^base_model\.model\.", "base_model.model.module."),
    (r"^base_model\.model\.", "_fsdp_wrapped_module.base_model._fsdp_wrapped_module.model."),
    (r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    (r"_proj\.lora", "_proj._orig_mod.lora"),
]


@pytest.mark.parametrize(("old", "new"), _WRAPPED)
@pytest.mark.parametrize("name", ["patterns", "dora", "tied"])
def test_wrappers_parts_name_nothing(tmp_path: Path, name: str, old: str, new: str) -> None:
    def wrapped(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        return {re.sub(old, new, path): tensor for path, tensor in tensors.items()}

    folder = fixtures.changed(tmp_path / "a", name, {}, wrapped)
    model = fixtures.model(fixtures.base_of(name))
    AdapterContainer.from_directory(folder).load(into=model)
    logits = np.array(model(fixtures.tokens()).astype(mx.float32))
    np.testing.assert_allclose(logits, fixtures.expected(name), atol=1e-4, rtol=0)


def test_a_file_is_written_without_them(tmp_path: Path) -> None:
    def wrapped(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        return {f"_orig_mod.{path}": tensor for path, tensor in tensors.items()}

    found = read_unplaced(fixtures.changed(tmp_path / "a", "plain", {}, wrapped))
    assert found.open == {}
    write_adapter(tmp_path / "b", found.weights, "mlx")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert all(key.startswith("model.layers.") for key in config["lora_parameters"]["keys"])


@pytest.mark.parametrize(
    "fields",
    [
        {
            "target_modules": [
                "_orig_mod.model.layers.0.self_attn.q_proj",
                "module.model.layers.1.mlp.up_proj",
            ]
        },
        {"target_modules": r"_orig_mod\.model\.layers\.0\.self_attn\.q_proj|.*\._orig_mod\.up_proj"},
        {"rank_pattern": {r"^_orig_mod\.model\.layers\.0\.self_attn\.q_proj": 7}},
        {"exclude_modules": ["_orig_mod.model.layers.0.self_attn.q_proj"]},
    ],
)
def test_a_configs_names_lose_them_too(fields: dict[str, Any]) -> None:
    values = {"peft_type": "LORA", "target_modules": ["q_proj"]} | fields
    shown = str(PeftConfig.from_values(values, "a").fields.model_dump())
    assert "_orig_mod" not in shown
    assert "model" in shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.model.layers.0.q", "model.layers.0.q"),
        ("model.module.q", "model.module.q"),
        ("submodule.q", "submodule.q"),
        ("module", "module"),
        ("a._orig_mod.b", "a.b"),
    ],
)
def test_only_the_parts_of_wrappers_go(name: str, expected: str) -> None:
    assert unwrapped(name) == expected


def test_patterns_lose_them_escaped_or_not() -> None:
    assert unwrapped_pattern(r"^_orig_mod\.model\.q") == r"^model\.q"
    assert unwrapped_pattern(r".*_fsdp_wrapped_module.q_proj") == ".*q_proj"
    assert unwrapped_pattern(r"^module\.model\.q") == r"^model\.q"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"^(?!.*(?:visual|vision_tower|lm_head)).*(?:q_proj|v_proj|k_proj|o_proj).*"},
        {"target_modules": r".*\.(?<!lm_)\w+_proj"},
        {"exclude_modules": r"(?=visual).*"},
    ],
)
def test_look_around_leaves_the_modules_to_the_tensors(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = fixtures.changed(tmp_path / "a", "plain", fields)
    model = fixtures.model("llama")
    container = AdapterContainer.from_directory(folder)
    mapped = container.place(model)
    (note,) = mapped.warnings
    assert re.search(r"look-around\), so that the file's tensors say which modules are adapted: \d+\.$", note)
    assert note in read_unplaced(folder).warnings
    container.load(into=model)
    logits = np.array(model(fixtures.tokens()).astype(mx.float32))
    np.testing.assert_allclose(logits, fixtures.expected("plain"), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(?!x).*q_proj", "ensure_weight_tying": True},
        {"target_modules": r"(?!x)(.)\1(", "ensure_weight_tying": False},
        {"rank_pattern": {"(?!x).*q_proj": 3}},
    ],
)
def test_what_tensors_cannot_tell_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapterError):
        PeftConfig.from_values({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields, "a")

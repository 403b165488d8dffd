"""Whatever JSON a config holds, it is read or refused by the names of its fields."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.peft.config import PeftConfig, PeftFields
from adapters_core.formats.peft.targets import is_target, is_target_parameter, rank_and_scale

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("a.*+?()[]{}|\\dq_proj^$,0123456789", max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = [*PeftFields.model_fields, "init_lora_weights", "use_qalora", "eva_config", "unheard_of"]
_NAME = "model.layers.0.self_attn.q_proj"


def _read(values: dict[str, Any]) -> tuple[PeftConfig | None, tuple[str, ...]]:
    try:
        return PeftConfig.from_values(values, "test"), ()
    except InvalidAdapterError as error:
        return None, error.problems


@given(st.dictionaries(st.sampled_from(_FIELDS), _json, max_size=6))
@example({"lora_alpha": 10**400})
@example({"r": 2**70})
@example({"target_modules": "\ud800"})
@example({"rank_pattern": {"(?i)q_proj": 2}})
@example({"layers_to_transform": [0], "layers_pattern": "layers|h"})
@example({"layers_to_transform": [0], "layers_pattern": "(?P<idx>a)"})
def test_any_json_is_read_or_refused_with_its_problems(values: dict[str, Any]) -> None:
    values = {"peft_type": "LORA", "target_modules": ["q_proj"]} | values
    config, problems = _read(values)
    if config is None:
        assert problems
        assert all(problem.startswith("adapter_config.json: ") for problem in problems)
        assert len(set(problems)) == len(problems)
        return
    assert config.fields.peft_type == "LORA"
    assert isinstance(is_target(config.fields, _NAME, is_linear=True), bool)
    assert isinstance(is_target_parameter(config.fields, _NAME), bool)
    rank, scale = rank_and_scale(config, _NAME)
    assert rank >= 1
    assert scale == pytest.approx(scale)

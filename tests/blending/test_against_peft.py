"""The merged deltas against those of PEFT's `add_weighted_adapter`, made once by `make_fixtures.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.blending.blend import BlendOptions, BlendPart, blend
from adapters_core.layers.module_weights import ModuleWeights
from tests.blending.parts import delta
from tests.models import relative_error

EQUAL = ["cat", "svd", "svd_3", "ties", "ties_12", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class Fixture:
    """Three adapters, and what PEFT made of them."""

    adapters: dict[str, dict[str, ModuleWeights]]
    cases: dict[str, dict[str, Any]]
    merged: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def peft() -> Fixture:
    loaded: Any = mx.load(str(Path(__file__).with_name("peft.safetensors")), return_metadata=True)
    tensors, metadata = loaded
    scales, cases = json.loads(metadata["scales"]), json.loads(metadata["cases"])
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    adapters: dict[str, dict[str, ModuleWeights]] = {name: {} for name in scales}
    for name in names:
        adapter, _, module = name.partition(".")
        factors = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        adapters[adapter][module] = ModuleWeights(*factors, None, scales[adapter])
    merged = {
        case: {
            name.removeprefix(f"{case}."): np.array(tensor)
            for name, tensor in tensors.items()
            if name.startswith(f"{case}.")
        }
        for case in cases
    }
    return Fixture(adapters, cases, merged)


def blended(peft: Fixture, case: str) -> dict[str, np.ndarray]:
    """What this package makes of a case's adapters."""
    fields = peft.cases[case]
    parts = [BlendPart(name, weight, peft.adapters[name]) for name, weight in fields["parts"].items()]
    options = BlendOptions(fields["method"], fields.get("density"), fields.get("rank"))
    return {path: delta(module) for path, module in blend(parts, options).modules.items()}


@pytest.mark.parametrize("case", EQUAL)
def test_merged_deltas_are_those_of_peft(peft: Fixture, case: str) -> None:
    ours, theirs = blended(peft, case), peft.merged[case]
    assert ours.keys() == theirs.keys() == {"embed", "up", "down"}
    for module, expected in theirs.items():
        tolerance = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(ours[module], expected, atol=tolerance, rtol=0, err_msg=module)


def test_peft_s_linear_on_factors_is_not_the_sum_and_ours_is(peft: Fixture) -> None:
    for module, of_peft in peft.merged["on_factors"].items():
        parts = [peft.adapters[name] for name in ("a", "b")]
        exact = sum((delta(part[module]) for part in parts if module in part), np.zeros(of_peft.shape))
        assert relative_error(blended(peft, "on_factors")[module], exact) < 1e-6
        if all(module in part for part in parts):
            assert relative_error(of_peft, exact) > 0.3

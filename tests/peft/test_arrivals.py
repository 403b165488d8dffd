"""What a model's own loading makes of weights is seen and followed, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from adapters_core.formats.peft.arrivals import arrivals
from adapters_core.formats.peft.config import PeftConfig
from adapters_core.formats.peft.mapping import map_onto
from tests.mixed.architectures import tiny

Tensors = dict[str, mx.array]
WIDTH = 6


class _Model(nn.Module):
    """Linear layers of the given rows, and a way in."""

    def __init__(self, way_in: Callable[[Tensors], Tensors], **rows: int) -> None:
        super().__init__()
        self._way_in = way_in
        for name, count in rows.items():
            self[name] = nn.Linear(WIDTH, count, bias=False)

    def sanitize(self, weights: Tensors) -> Tensors:
        return self._way_in(weights)


def _in_place(weights: Tensors) -> Tensors:
    weights["a.weight"] *= 0.5
    return weights


def _by_row(weights: Tensors) -> Tensors:
    return {"a.weight": weights["a.weight"] * mx.array([1.0, -2.0, 0.3, 4.0])[:, None]}


def _permuted(weights: Tensors) -> Tensors:
    return {"b.weight": weights["a.weight"].reshape(2, 2, -1).swapaxes(0, 1).reshape(4, -1)}


def _split(weights: Tensors) -> Tensors:
    first, second = mx.split(weights.pop("a.weight"), 2)
    return {"b.weight": second * 3, "c.weight": first}


def _joined(weights: Tensors) -> Tensors:
    parts = [weights.pop(f"{name}.weight") for name in "xyz" if f"{name}.weight" in weights]
    return weights | ({"b.weight": mx.concatenate(parts)} if len(parts) == 3 else {})


def _asks(weights: Tensors) -> Tensors:
    """Asks for a weight that the adapter has nothing for, and heeds its shape."""
    is_converted = weights["b.weight"].shape[0] != 4
    return weights if is_converted else weights | {"a.weight": weights["a.weight"] * 2}


def _difference(model: nn.Module, base: Tensors, deltas: Tensors) -> Tensors:
    """What the merged weights are more than the base's, both as the model takes them in."""
    sanitize: Any = model.sanitize
    before = sanitize({name: mx.array(value) for name, value in base.items()})
    after = sanitize({name: value + deltas.get(name, 0) for name, value in base.items()})
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize(
    ("way_in", "rows", "base"),
    [
        (_in_place, {"a": 4}, {"a": 4}),
        (_by_row, {"a": 4}, {"a": 4}),
        (_permuted, {"b": 4}, {"a": 4}),
        (_split, {"b": 2, "c": 2}, {"a": 4}),
        (_joined, {"b": 9}, {"x": 2, "y": 3, "z": 4}),
        (_asks, {"a": 4, "b": 4}, {"a": 4}),
    ],
)
def test_factors_follow_what_loading_does_to_the_weight(
    way_in: Callable[[Tensors], Tensors], rows: dict[str, int], base: dict[str, int]
) -> None:
    model = _Model(way_in, **rows)
    before = dict(tree_flatten(model.parameters()))
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": mx.array(rng.normal(size=(count, WIDTH))) for name, count in base.items()}
    rest = {f"{name}.weight": mx.zeros((count, WIDTH)) for name, count in rows.items()}
    tensors: Tensors = {}
    deltas: Tensors = {}
    for name, count in base.items():
        a, b = mx.array(rng.normal(size=(2, WIDTH))), mx.array(rng.normal(size=(count, 2)))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        deltas[f"{name}.weight"] = 2 * (b @ a)
    config = PeftConfig.from_values(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(base)}, "test"
    )
    mapped = map_onto(model, config, tensors)
    assert not mapped.problems
    expected = _difference(model, (rest if way_in is _asks else {}) | weights, deltas)
    for path, wanted in expected.items():
        own = mapped.weights.get(path.removesuffix(".weight"))
        delta = mx.zeros_like(wanted) if own is None else own.scale * (own.lora_a @ own.lora_b).T
        np.testing.assert_allclose(np.array(delta), np.array(wanted), atol=1e-5, rtol=0)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is value for name, value in before.items())


def _normalised(weights: Tensors) -> Tensors:
    weight = weights["a.weight"]
    return {"a.weight": weight / mx.linalg.norm(weight, axis=-1, keepdims=True)}


def _shifted(weights: Tensors) -> Tensors:
    return {"a.weight": weights["a.weight"] + 1}


def _mixed(weights: Tensors) -> Tensors:
    return {"a.weight": weights["a.weight"] + weights["a.weight"][::-1]}


def _cut(weights: Tensors) -> Tensors:
    return {"a.weight": weights["a.weight"][:3]}


def _dropped(weights: Tensors) -> Tensors:
    return {name: value for name, value in weights.items() if name != "a.weight"}


def _fails(weights: Tensors) -> Tensors:
    raise ValueError("no")


def _depends(weights: Tensors) -> Tensors:
    return {"a.weight": weights["a.weight"] * (2 if "b.weight" in weights else 1)}


@pytest.mark.parametrize(
    ("way_in", "reason"),
    [
        (_normalised, "in a way that factors cannot follow"),
        (_shifted, "in a way that factors cannot follow"),
        (_mixed, "in a way that factors cannot follow"),
        (_cut, "in a way that factors cannot follow"),
        (_dropped, "leaves it out"),
        (_fails, "cannot be followed (ValueError: no)"),
        (_depends, "depends on what else the checkpoint has"),
    ],
)
def test_what_factors_cannot_follow_is_refused_with_the_reason(
    way_in: Callable[[Tensors], Tensors], reason: str
) -> None:
    found = arrivals(_Model(way_in, a=4, b=4), {"a.weight": (4, WIDTH)})
    assert not found.found
    assert reason in found.reasons["a.weight"]


def test_arrivals_in_a_model_whose_loading_took_its_head_out() -> None:
    model = tiny("gemma3, sliding windows")
    embedding = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    model.sanitize(dict(embedding))
    assert "lm_head" not in model
    found = arrivals(model, {"model.embed_tokens.weight": (96, 64)})
    assert [one.is_plain for one in found.found["model.embed_tokens.weight"]] == [True]
    assert not found.reasons

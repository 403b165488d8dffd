"""Forms are chosen by what they take; the model is as before, whatever was measured."""

from __future__ import annotations

import time
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.calibration import REGIMES, calibrate
from adapters_core.errors import UnsupportedModelError
from adapters_core.mixed.routing import Routing
from adapters_core.timing import fastest, in_turns
from tests.mixed.architectures import tiny
from tests.models import snapshot, tiny_llama


def random_state() -> list[bytes]:
    return [np.array(one).tobytes() for one in cast("list[mx.array]", mx.random.state)]


def wait(routing: Routing, seconds: float) -> None:
    time.sleep(seconds)


def test_calibration_takes_the_fastest_form_and_leaves_all_as_it_was() -> None:
    model = tiny_llama()
    before, state = snapshot(model), random_state()
    active = mx.get_active_memory()
    found = calibrate(model, {"more": 0.01, "most": 0.02, "none": 0.0}, wait, REGIMES[:2], limit_seconds=30)
    assert found.chosen == {regime.name: "none" for regime in REGIMES[:2]}
    for seconds in found.seconds.values():
        assert seconds["none"] < seconds["more"] < seconds["most"]
    assert snapshot(model) == before
    assert mx.get_active_memory() <= active
    assert random_state() == state


def test_calibration_keeps_the_default_where_time_is_up() -> None:
    found = calibrate(tiny_llama(), {"most": 0.06, "none": 0.0}, wait, limit_seconds=0.0)
    assert set(found.chosen.values()) == {"most"}
    assert found.seconds == {}


def test_calibration_of_one_form_measures_nothing() -> None:
    def never(routing: Routing, form: int) -> None:
        raise AssertionError("nothing is to be measured")

    found = calibrate(tiny_llama(), {"only": 1}, never)
    assert (set(found.chosen.values()), found.seconds) == ({"only"}, {})


def test_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    def fail(routing: Routing, form: int) -> None:
        raise UnsupportedModelError(["this form fails"])

    model = tiny("qwen3_next, recurrent, experts")
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError):
        calibrate(model, {"one": 1, "two": 2}, fail)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0.9, 0.9, 0.9, 0.9], "second"),
        ([1.0, 1.0, 1.0, 1.0], [0.97, 0.97, 0.97, 0.97], "first"),
        ([1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 1.2, 1.2], "first"),
        ([1.0, 3.0, 1.0, 1.0], [0.9, 2.7, 0.9, 1.1], "second"),
        ([1.0, 1.0, 1.0, 1.0], [1.1, 1.1, 1.1, 1.1], "first"),
    ],
)
def test_fastest_is_faster_by_more_than_noise(first: list[float], second: list[float], expected: str) -> None:
    assert fastest({"first": first, "second": second}) == expected
    assert fastest({"first": first, "worse": [2 * one for one in second], "second": second}) == expected


def test_turns_go_forth_and_back_within_their_time() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    runs = {name: lambda name=name: run(name) for name in "abc"}
    found = in_turns(runs, fewest=2, most=9, budget_seconds=0.0)
    assert "".join(order) == "abccba"
    assert found == {"a": [1.0, 6.0], "b": [2.0, 5.0], "c": [3.0, 4.0]}
    assert len(in_turns(runs, fewest=1, most=3, budget_seconds=1e9)["a"]) == 3

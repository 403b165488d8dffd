"""Forms are chosen by what they take; the model is as before, whatever was measured."""

from __future__ import annotations

from dataclasses import fields
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.calibration import calibrate, compute_with
from adapters_core.errors import UnsupportedModelError
from adapters_core.mixed.forms import Form, Forms
from adapters_core.mixed.routing import Routing
from adapters_core.timing import fastest, in_turns
from tests.mixed.architectures import tiny
from tests.models import snapshot, tiny_llama

BOTH = [Form.GATHER, Form.COPY]


def random_state() -> list[bytes]:
    return [np.array(one).tobytes() for one in cast("list[mx.array]", mx.random.state)]


class Device:
    """One on which time passes by the form alone: a second for the fast one, two for others."""

    def __init__(self, fast: Form) -> None:
        self.seconds = 0.0
        self._fast = fast

    def use(self, routing: Routing, form: Form) -> None:
        compute_with(routing, form)
        self.seconds += 1.0 if form is self._fast else 2.0

    def clock(self) -> float:
        return self.seconds


def test_calibration_takes_the_fastest_form_and_leaves_all_as_it_was() -> None:
    model = tiny_llama()
    before, state, active = snapshot(model), random_state(), mx.get_active_memory()
    device = Device(Form.COPY)
    found = calibrate(model, BOTH, device.use, limit_seconds=120, clock=device.clock)
    assert device.seconds <= 150
    assert found.forms == Forms.all(Form.COPY)
    assert found.seconds.keys() == {field.name for field in fields(Forms)}
    for seconds in found.seconds.values():
        assert min(seconds, key=seconds.__getitem__) == Form.COPY
    assert snapshot(model) == before
    assert random_state() == state
    assert mx.get_active_memory() <= active


def test_calibration_keeps_the_default_where_time_is_up() -> None:
    device = Device(Form.COPY)
    found = calibrate(tiny_llama(), BOTH, device.use, limit_seconds=60, clock=device.clock)
    assert found.forms == Forms(Form.GATHER, Form.COPY, Form.COPY)
    assert found.seconds.keys() == {"decoding_many", "reading"}
    device = Device(Form.COPY)
    found = calibrate(tiny_llama(), BOTH, device.use, limit_seconds=0.0, clock=device.clock)
    assert (found.forms, found.seconds) == (Forms.all(Form.GATHER), {})


def test_calibration_of_one_form_measures_nothing() -> None:
    def never(routing: Routing, form: Form) -> None:
        raise AssertionError("nothing is to be measured")

    found = calibrate(tiny_llama(), [Form.COPY], never)
    assert (found.forms, found.seconds) == (Forms.all(Form.COPY), {})


def test_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    def fail(routing: Routing, form: Form) -> None:
        raise UnsupportedModelError(["this form fails"])

    model = tiny("qwen3_next, recurrent, experts")
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError):
        calibrate(model, BOTH, fail)
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

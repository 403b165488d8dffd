"""The check passes where all is exact, and sees each error that is planted into what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters_core.check.bits import changes, fingerprint
from adapters_core.check.model import check_model
from adapters_core.check.report import CheckReport
from adapters_core.check.rows import Resident
from adapters_core.container import AdapterContainer
from adapters_core.layers.surgery import Surgery, replace_modules
from adapters_core.layers.targets import module_at
from adapters_core.mixed.residents import ResidentAdapter
from tests.mixed.architectures import tiny
from tests.models import snapshot, tiny_llama

WRONG_PLACE = "model.layers.1.self_attn.v_proj"


class Wrong(nn.Module):
    """A layer that errs: `error` is given the input and the right output."""

    def __init__(self, right: nn.Module, error: Callable[[mx.array, mx.array], mx.array]) -> None:
        super().__init__()
        self.right = right
        self._error = error

    def __call__(self, x: mx.array) -> mx.array:
        return self._error(x, self.right(x))


class WrongBank:
    """A real bank in which one layer errs from the first adapter on."""

    def __init__(self, bank: Any, model: nn.Module, error: Callable[[mx.array, mx.array], mx.array]) -> None:
        self._bank = bank
        self._model = model
        self._error = error
        self._surgery: Surgery | None = None

    def add(self, adapter: AdapterContainer) -> ResidentAdapter:
        if self._surgery is not None:
            self._surgery.undo()
        resident = self._bank.add(adapter)
        right = dict(self._model.named_modules())[WRONG_PLACE]
        self._surgery = replace_modules(self._model, {WRONG_PLACE: Wrong(right, self._error)})
        return resident

    @property
    def resident_bytes(self) -> int:
        return self._bank.resident_bytes

    def close(self) -> None:
        if self._surgery is not None:
            self._surgery.undo()
        self._bank.close()


def with_error(error: Callable[[mx.array, mx.array], mx.array]) -> Callable[[nn.Module], Resident]:
    def make(model: nn.Module) -> Resident:
        resident = Resident(model)
        resident.bank = WrongBank(resident.bank, model, error)  # pyright: ignore[reportAttributeAccessIssue]
        return resident

    return make


def failed(report: CheckReport) -> list[str]:
    return [finding.what for finding in report.findings if not finding.passed]


@pytest.mark.parametrize(
    "make",
    [
        tiny_llama,
        lambda: tiny_llama(quantize_bits=3),
        lambda: tiny("qwen3, tied head"),
        lambda: tiny("afm7, split query, key and value"),
        lambda: tiny("olmoe, flat tokens and biases"),
        lambda: tiny("qwen3_next, recurrent, experts"),
    ],
)
def test_a_check_passes_and_leaves_the_model_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = snapshot(model)
    report = check_model(model, counts=[1, 4], with_speed=False)
    assert [finding for finding in report.findings if not finding.passed] == []
    assert report.is_exact
    assert snapshot(model) == before
    compared = [finding for finding in report.findings if finding.error is not None]
    assert len(compared) >= 20
    assert {finding.allowed for finding in compared} == {max(1e-4, 4 * report.noise)}
    assert (report.dtype, report.layouts >= 5, report.ratios) == ("float32", True, ())
    assert 0 < report.memory.adapter_bytes < report.memory.peak_bytes


def test_a_check_in_half_precision_allows_what_its_roundings_do() -> None:
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    report = check_model(model, counts=[1, 4], with_speed=False)
    assert failed(report) == []
    allowed = {finding.allowed for finding in report.findings if finding.allowed is not None}
    assert allowed == {max(0.02, 4 * report.noise)}
    assert report.dtype == "bfloat16"


def test_a_check_measures_each_mix_of_adapters() -> None:
    report = check_model(tiny_llama(), counts=[2])
    sides = {(ratio.work, ratio.side) for ratio in report.ratios}
    mixes = ["one adapter", "three ranks", "nine layouts", "LoRA with DoRA", "with base rows"]
    assert sides == {(work, mix) for work in ("decoding", "reading") for mix in mixes}
    for ratio in report.ratios:
        assert 0 < ratio.lowest <= ratio.ratio <= ratio.highest
        assert (ratio.rows, ratio.base_ms > 0, ratio.blocks >= 3) == (2, True, True)


def test_a_check_sees_a_layer_that_errs_while_decoding() -> None:
    def error(x: mx.array, y: mx.array) -> mx.array:
        return y * 1.01 if x.shape[1] == 1 else y

    report = check_model(tiny_llama(), with_error(error), counts=[4], with_speed=False)
    assert not report.is_exact
    assert "nine layouts, 4 rows" in failed(report)
    worst = next(finding for finding in report.findings if finding.what == "nine layouts, 4 rows")
    assert worst.error is not None
    assert worst.error > 1e-4
    assert worst.note.startswith("worst in row ")


def test_a_check_sees_one_row_with_its_neighbours_adapter() -> None:
    def error(x: mx.array, y: mx.array) -> mx.array:
        rows = mx.arange(y.shape[0])
        return y[mx.where(rows == 3, 2, rows)] if y.shape[0] == 4 else y

    report = check_model(tiny_llama(), with_error(error), counts=[1, 4], with_speed=False)
    rows = [name for name in failed(report) if name.endswith("4 rows")]
    assert "three ranks, 4 rows" in rows
    assert not any("alone" in name for name in failed(report))


def test_a_check_sees_other_bits_in_base_rows() -> None:
    state = {"forwards": 0}

    def error(x: mx.array, y: mx.array) -> mx.array:
        state["forwards"] += 1
        return y + state["forwards"] * mx.array(1e-7)  # far below what logits are compared by

    report = check_model(tiny_llama(), with_error(error), counts=[4], with_speed=False)
    assert failed(report) == ["with base rows, 4 rows: base rows", "everything, 4 rows: base rows"]


def test_a_check_sees_a_base_that_was_changed() -> None:
    def make(model: nn.Module) -> Resident:
        weight = module_at(model, "model.layers.0.mlp.up_proj")["weight"]
        weight[0, 0] = weight[0, 0] * (1 + 2**-20)
        return Resident(model)

    report = check_model(tiny_llama(), make, counts=[1], with_speed=False)
    assert "adapters in and out of a batch" in failed(report)
    assert not report.is_exact
    note = next(
        finding.note for finding in report.findings if finding.what == "adapters in and out of a batch"
    )
    assert note == "1 differ: weights model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_fingerprint_shows_one_bit_of_any_weight(dtype: mx.Dtype) -> None:
    model = nn.Linear(7, 5)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    before = fingerprint(model)
    assert changes(before, fingerprint(model)) == []
    words = mx.uint32 if dtype == mx.float32 else mx.uint16
    flipped = model.weight.view(words)
    flipped[4, 6] = mx.bitwise_xor(flipped[4, 6], mx.array(1, words))
    model.weight = flipped.view(dtype)
    assert changes(before, fingerprint(model)) == ["weights weight"]

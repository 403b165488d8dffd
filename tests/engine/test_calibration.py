"""What was measured is kept, found again, and measured anew where the file is of no use."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import mlx.nn as nn
import pytest
from structlog.testing import capture_logs

from adapters_core.mixed.forms import MANY_ROWS, Form, Forms, forms_of
from server.engine.calibration import choose_forms, kept_or_measured
from tests.models import snapshot, tiny_llama

BOTH = [Form.GATHER, Form.COPY]


def events(model: nn.Module, folder: Path, forms: list[Form] = BOTH) -> tuple[Forms, list[str]]:
    with capture_logs() as logs:
        found = kept_or_measured(model, forms, folder)
    return found, [log["event"] for log in logs]


def test_a_measurement_is_kept_and_found_again(tmp_path: Path) -> None:
    model = tiny_llama()
    before = snapshot(model)
    first, told = events(model, tmp_path / "calibration")
    assert told == ["forms measured"]
    assert snapshot(model) == before
    assert events(tiny_llama(seed=3), tmp_path / "calibration") == (first, ["forms as measured before"])
    assert len(list((tmp_path / "calibration").iterdir())) == 1
    # Another shape, and other forms to choose from, are other measurements.
    assert events(tiny_llama(num_hidden_layers=1), tmp_path / "calibration")[1] == ["forms measured"]
    assert events(model, tmp_path / "calibration", BOTH[::-1])[1] == ["forms measured"]
    assert len(list((tmp_path / "calibration").iterdir())) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"forms": {"reading": "no such form"}}'])
def test_a_damaged_file_is_measured_again(damage: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    events(model, tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage)
    told = events(model, tmp_path)[1]
    assert told == ["the file of a measurement is damaged and is made again", "forms measured"]
    assert json.loads(file.read_text())["key"] == json.loads(whole)["key"]
    assert events(model, tmp_path)[1] == ["forms as measured before"]


def test_a_folder_that_cannot_be_written_is_told_and_changes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, told = events(tiny_llama(num_hidden_layers=1), tmp_path / "file" / "calibration")
    assert isinstance(found, Forms)
    assert told[-2:] == ["forms measured", "what was measured cannot be kept"]


def test_without_a_measurement_the_devices_defaults_are_used(tmp_path: Path) -> None:
    assert choose_forms(tiny_llama(), tmp_path, measured=False) in [Forms.all(form) for form in Form]
    assert events(tiny_llama(), tmp_path, [Form.COPY]) == (Forms.all(Form.COPY), [])
    assert list(tmp_path.iterdir()) == []
    assert (forms_of(on_cuda=True), forms_of(on_cuda=False)[0]) == ((Form.COPY,), Form.GATHER)


@pytest.mark.parametrize("name", [field.name for field in fields(Forms)])
def test_forms_apply_to_their_own_regime(name: str) -> None:
    values = {field.name: Form.GATHER for field in fields(Forms)} | {name: Form.COPY}
    forms = Forms(**values)
    batches = {"decoding_few": (MANY_ROWS - 1, 1), "decoding_many": (MANY_ROWS, 1), "reading": (1, 2)}
    copied = [regime for regime, (rows, tokens) in batches.items() if forms.copies(rows, tokens)]
    assert copied == [name]

"""What a report holds, how it is shown, and that a file of it is the same report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import ReportError, command_of, read_report
from benchmarks.tables import number, show

from .reports import report_of


def shown(path: Path) -> tuple[list[list[str]], list[str]]:
    output = io.StringIO()
    show(report_of(path), Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")], lines


def test_the_tables_show_medians_spreads_and_goals(tiny_model_path: Path) -> None:
    rows, lines = shown(tiny_model_path)
    assert ["mlx-graft, base, 4 requests", "12.0", "1000", "150", "3"] in rows
    assert ["mlx_lm.server, base, 4 requests", "6.0", "1000", "150", "2"] in rows
    assert ["ours ÷ theirs [x]", "3.00", "2.00 to 4.00", "≥ 3.5", "no", "2"] in rows
    assert ["growth", "12.0%", "6.00 to 24.0%", "≤ 12%", "yes", "3"] in rows
    assert ["mixed ÷ base", "0.62", "0.50 to 0.75", "", "", "2"] in rows
    pair = "mlx-graft, base, 4 requests and mlx_lm.server, base, 4 requests"
    assert f"Same answers, word for word: {pair}: 1 of 3." in lines
    for line in ("Note: a note", "Note: odd [that].", "Failed: churn: it broke [off]"):
        assert line in lines
    assert any("About [one]." in line for line in lines)
    assert any(line.startswith("Model: tiny, F32. MLX on ") for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.949, "0.95"), (9.994, "9.99"), (12.34, "12.3"), (-0.12, "-0.12"), (1234.5, "1234.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_file_is_the_same_report(tiny_model_path: Path, tmp_path: Path) -> None:
    report = report_of(tiny_model_path)
    file = tmp_path / "report.json"
    file.write_text(report.to_json())
    assert read_report(file) == report
    values = json.loads(file.read_text())
    assert values["schema_version"] == 3
    assert values["environment"]["packages"]["mlx"]
    assert values["model"]["tensors"] == {"F32": 20}
    figure = values["cases"][0]["figures"][0]
    assert (figure["values"], figure["median"], figure["reached"]) == ({"1": 4.0, "2": 2.0}, 3.0, False)
    assert figure["goal"] == {"bound": 3.5, "at_least": True}
    ours = values["cases"][0]["measures"][0]
    assert ours["rounds"]["2"]["values"]["tokens_per_second"] == [12.0]
    assert values["cases"][2]["failure"] == "it broke [off]\nits log"


def test_the_command_names_no_folders() -> None:
    given = ["bench", "all", "--json", "/home/me/my report.json", "--model=/models/tiny=1/", "--rounds", "5"]
    assert command_of(given) == "mlx-graft bench all --json 'my report.json' --model=tiny=1 --rounds 5"
    assert command_of(["bench", "--quick", "--minutes=0.5"]) == "mlx-graft bench --quick --minutes=0.5"


def test_a_file_of_another_kind_is_refused_in_a_sentence(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(
        report_of(tiny_model_path).to_json().replace('"schema_version": 3', '"schema_version": 2')
    )
    with pytest.raises(ReportError, match=r"report of schema 3 in old\.json, but schema_version: "):
        read_report(file)
    file.write_text("{}")
    with pytest.raises(ReportError, match=r"Make it anew with mlx-graft bench"):
        read_report(file)

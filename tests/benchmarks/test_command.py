"""The command as people run it: every side, one small round, a table and a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.cases import CASES, measures_of
from benchmarks.cli import make_app


def test_all_cases_run_and_all_sides_give_the_same_answers(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    size = ["--rounds", "1", "--requests", "6", "--adapters", "3", "--max-tokens", "5"]
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--model",
        str(tiny_model_path),
        *size,
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text())
    ratios = [ratio.name for case in CASES.values() for ratio in case.ratios]
    assert [ratio["name"] for ratio in values["ratios"]] == ratios
    assert all(ratio["median"] > 0 for ratio in values["ratios"])
    assert all(name in done.stdout for name in ratios)
    assert len(values["measures"]) == len(measures_of(CASES.values()))
    # Every side computes the same thing, adapters included, and no adapter is without effect.
    assert {(pair["same"], pair["compared"]) for pair in values["same_answers"]} == {(6, 6)}
    assert values["notes"] == []


def test_wrong_options_are_refused_in_a_sentence(tmp_path: Path) -> None:
    command = CliRunner(env={"COLUMNS": "400"})
    done = command.invoke(make_app(), ["everything"])
    assert done.exit_code == 2
    assert "expected cases among adapters, overhead, got everything" in done.stderr
    done = command.invoke(make_app(), ["--json", str(tmp_path / "none" / "report.json")])
    assert done.exit_code == 2
    assert "expected --json in a folder that exists" in done.stderr


def test_what_goes_wrong_is_a_sentence_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(make_app(), ["--model", str(tmp_path)])
    assert done.exit_code == 1
    assert "Error: expected a model folder" in done.stderr

"""`mlx-graft check`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from adapters_core.check.model import check_model
from adapters_core.check.report import CheckReport, Finding
from server.cli.check import conclude
from server.environment import describe_environment, describe_model
from tests.adapters.support import write_model
from tests.models import tiny_llama

from .conftest import Program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def report() -> CheckReport:
    return check_model(tiny_llama(), counts=[2], with_speed=False)


def test_check_ends_well_where_all_is_exact(command: Program, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = command("check", str(folder), "--rows", "2", "--rows", "1", "--no-speed", "--json", str(file))
    assert (done.code, done.err.count("error")) == (0, 0)
    lines = done.out.splitlines()
    assert lines[-1].startswith("All ")
    assert lines[-1].endswith(" comparisons are exact.")
    assert any(line.split()[:4] == ["ok", "nine", "layouts,", "2"] for line in lines)
    values = json.loads(file.read_text())
    assert values["exact"] is True
    assert (values["model"]["name"], values["dtype"]) == ("tiny", "float32")
    assert values["environment"]["packages"]["mlx"]
    assert values["ratios"] == []
    assert len(values["findings"]) == int(lines[-1].split()[1])
    assert str(folder.parent) not in file.read_text() + done.out
    assert str(Path.home()) not in file.read_text() + done.out


def test_check_fails_where_something_differs(
    report: CheckReport, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    wrong = Finding("one row", "mlx-lm's layers", False, error=0.5, allowed=1e-4, tokens=4, other_tokens=3)
    bits = Finding("base rows", "the base's bits", False, note="other bits in 1 of 2 rows, first 1")
    findings = (*report.findings, wrong, bits)
    with pytest.raises(typer.Exit) as ended:
        conclude(replace(report, findings=findings), describe_environment(), describe_model(folder), file)
    assert ended.value.exit_code == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: 2 of {len(findings)} comparisons differ; the first is 'one row'.\n"
    rows = [line.split() for line in printed.out.splitlines() if line.startswith("DIFFERS")]
    assert rows[0][:8] == ["DIFFERS", "one", "row", "5.0e-01", "1.0e-04", "1", "of", "4"]
    assert "other bits" in " ".join(rows[1])
    assert json.loads(file.read_text())["exact"] is False


def test_check_prints_a_line_for_each_mix(command: Program, folder: Path) -> None:
    done = command("check", str(folder), "--rows", "1")
    assert done.code == 0
    table = {line[:16].strip(): line[16:].split() for line in done.out.splitlines()}
    assert {"LoRA", "DoRA"} < table.keys()
    assert table["the base itself"][1::2] == ["ms", "ms"]


@pytest.mark.parametrize(
    "arguments", [["--rows", "0"], ["--json", "/no/such/folder/x.json"], ["--dtype", "int8"]]
)
def test_check_refuses_wrong_options(command: Program, folder: Path, arguments: list[str]) -> None:
    done = command("check", str(folder), *arguments)
    assert (done.code, done.out) == (2, "")


def test_check_of_what_is_no_model_is_a_sentence(command: Program, tmp_path: Path) -> None:
    done = command("check", str(tmp_path))
    assert (done.code, done.out) == (1, "")
    assert "is not a model folder" in done.err
    assert "Traceback" not in done.err

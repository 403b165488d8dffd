"""The command as people run it: cases of every kind, tiny sizes, tables and a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import read_report

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "server", "bench"]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)


def test_cases_run_and_all_sides_give_the_same_answers(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    names = ("adapters", "peer", "switching", "overhead", "first-token", "zipf", "prefix", "memory", "churn")
    done = bench(*names, "--quick", "--model", str(tiny_model_path), "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = read_report(file)
    assert [case.name for case in report.cases] == list(names)
    names_alone = "--quick --model tiny --json report.json"
    assert report.command == f"mlx-graft bench {' '.join(names)} {names_alone}"
    for case in report.cases:
        assert case.failure is None
        assert case.notes == ()
        assert all(measure.rounds for measure in case.measures)
    for figure in report.figures:
        assert figure.goal is None or figure.reached is not None
        assert figure.label[:40] in done.stdout.replace("\n", "")
    # Every side computes the same thing, adapters included.
    agreements = [pair for case in report.cases for pair in case.same_answers]
    assert [(pair.same, pair.compared) for pair in agreements] == [(1, 1), (4, 4), (4, 4), (4, 4), (4, 4)]
    memory = next(figure for figure in report.figures if figure.label.startswith("resident bytes"))
    assert 0.99 < memory.median < 1.2
    assert "round 1 of 1, BatchGenerator" in done.stderr


def test_the_cases_are_listed() -> None:
    done = bench("--list")
    assert done.returncode == 0, done.stderr
    assert "first-token" in done.stdout
    assert "fairness" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "expected cases among all, traffic"),
        (["--json", "nowhere/report.json"], "expected --json in a folder that exists"),
        (["--registered", "8"], "at most as many resident adapters"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_what_goes_wrong_is_a_sentence_too(tmp_path: Path) -> None:
    done = bench("--model", str(tmp_path))
    assert done.returncode == 1
    assert "error: expected a model folder" in done.stderr


def test_without_mlx_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()  # found first, and without a core
    done = bench("--list", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "MLX cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_all_processes(tiny_model_path: Path) -> None:
    command = [*COMMAND, "churn", "--model", str(tiny_model_path), "--cycles", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "preparing" in line:
                break
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
        (server,) = [pid for pid, parent in pairs if parent == running.pid]
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(60) == 130
    assert "Interrupted: all processes are ended" in rest
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)

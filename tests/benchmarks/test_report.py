"""What a report shows is what was measured, in the tables and in the JSON alike."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from benchmarks.cases import Case, LoadName, Measure, Ratio, SideName, make_loads
from benchmarks.environment import describe_environment, describe_model
from benchmarks.report import Report
from benchmarks.results import Answer, LoadResult, Outcome

GRAFT = Measure(SideName.GRAFT, LoadName.BASE)
MLX_LM = Measure(SideName.MLX_LM, LoadName.BASE)


def result(seconds: float, text: str) -> LoadResult:
    answers = tuple(Answer(text, 100, 25, 12, 0.5 * seconds, seconds) for _ in range(2))
    return LoadResult(seconds, answers)


def report(model_path: Path) -> Report:
    case = Case("one", "One ratio.", (Ratio("ours ÷ theirs", GRAFT, MLX_LM),))
    rounds = {
        GRAFT: {1: result(1.0, "a"), 2: result(2.0, "b"), 3: result(4.0, "c")},
        MLX_LM: {1: result(4.0, "a"), 2: result(4.0, "x")},
    }
    outcome = Outcome((case,), rounds, ("fewer rounds [of theirs]",))
    return Report(
        outcome,
        make_loads(2, 1, 12),
        {"adapter_kind": "rank8-qv"},
        describe_model(model_path),
        describe_environment(),
        61.0,
    )


def test_the_tables_show_medians_spread_ratios_and_notes(tiny_model_path: Path) -> None:
    output = io.StringIO()
    report(tiny_model_path).show(Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["mlx-graft, base", "12.0 (6.0 to 24.0)", "1.00", "2.0", "24", "25%", "3"],
        ["mlx_lm.server, base", "6.0 (6.0 to 6.0)", "2.00", "4.0", "24", "25%", "2"],
        ["ours ÷ theirs", "3.00", "2.00 to 4.00", "1, 2"],
    ]
    assert "Note: fewer rounds [of theirs]" in lines
    assert "Same answers, word for word: mlx-graft, base and mlx_lm.server, base: 2 of 4." in lines
    assert "Model: tiny, F32." in lines
    assert any(line.startswith("mlx-graft ") and "; mlx-lm " in line for line in lines)


def test_the_json_holds_every_round(tiny_model_path: Path) -> None:
    values = json.loads(report(tiny_model_path).to_json())
    assert values["ratios"] == [
        {
            "case": "one",
            "name": "ours ÷ theirs",
            "numerator": {"side": "mlx-graft", "load": "base"},
            "denominator": {"side": "mlx_lm.server", "load": "base"},
            "rounds": [1, 2],
            "median": 3.0,
            "lowest": 2.0,
            "highest": 4.0,
            "values": [4.0, 2.0],
        }
    ]
    ours, theirs = values["measures"]
    assert [found["round"] for found in ours["rounds"]] == [1, 2, 3]
    assert ours["rounds"][2]["tokens_per_second"] == 6.0
    assert ours["rounds"][2]["answers"][0]["text"] == "c"
    assert theirs["tokens_per_second"]["values"] == [6.0, 6.0]
    assert values["model"]["tensors"] == {"F32": 20}
    assert values["environment"]["packages"]["mlx"]
    assert values["notes"] == ["fewer rounds [of theirs]"]

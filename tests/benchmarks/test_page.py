"""Figures in a page, made from reports and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.page import PageError, filled

from .reports import report_of

OWN_PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
PAGE = """# Title
<!-- bench: goals -->
old
<!-- end -->
between
<!-- bench: fairness -->
<!-- end -->
<!-- bench: zipf -->
kept
<!-- end -->
"""


def test_blocks_are_filled_and_the_rest_stays(tiny_model_path: Path) -> None:
    report = report_of(tiny_model_path)
    text, names = filled(PAGE, [report])
    assert names == ["goals", "fairness"]
    lines = text.splitlines()
    assert "| ours ÷ theirs [x] | **3.00** | 2.00 to 4.00 | ≥ 3.5 | no | 2 |" in lines
    assert "| growth | **12.0%** | 6.00 to 24.0% | ≤ 12% | yes | 3 |" in lines
    assert "| mlx-graft, base, 4 requests | 12.0 | 1000 | 150 | 3 |" in lines
    assert "| mixed ÷ base | **0.62** | 0.50 to 0.75 |  |  | 2 |" in lines
    assert "Of 3 answers of sides that were asked the same, 1 are equal, word for word." in lines
    assert "Failed: churn: it broke [off] its log" in lines
    assert "old" not in lines
    assert {"# Title", "between", "kept"} <= set(lines)
    assert filled(text, [report_of(tiny_model_path)])[0].count("ours ÷ theirs") == 1


def test_one_cases_report_leaves_the_goals_as_they_are(tiny_model_path: Path) -> None:
    text, names = filled(PAGE, [report_of(tiny_model_path, whole=False)])
    assert names == ["fairness"]
    assert "<!-- bench: goals -->\nold\n" in text


def test_each_block_says_which_run_it_is_of(tiny_model_path: Path) -> None:
    first = report_of(tiny_model_path)
    second = replace(first, command="mlx-graft bench fairness", seconds=99.0, cases=first.cases[1:2])
    text, _ = filled(PAGE, [first, second])
    goals, fairness = (
        text.partition(f"<!-- bench: {name} -->\n")[2].partition("<!-- end -->")[0]
        for name in ("goals", "fairness")
    )
    for block, report, seconds in ((goals, first, 12), (fairness, second, 99)):
        run = f"Run of {report.created:%Y-%m-%d %H:%M} UTC. Command: {report.command}"
        assert f"<summary>{run}</summary>\n\nValues of a measure are " in block
        assert block.count("Run of") == block.count("Model: tiny, F32.") == 1
        assert f"took {seconds} seconds. Note: a note\n\n</details>\n" in block


@pytest.mark.parametrize("page", ["# Title\n", "<!-- bench: zipf -->\n<!-- end -->\n"])
def test_a_page_without_a_place_is_an_error(tiny_model_path: Path, page: str) -> None:
    with pytest.raises(PageError, match="expected a line <!-- bench: NAME -->"):
        filled(page, [report_of(tiny_model_path)])


def test_reports_without_figures_are_an_error_on_the_projects_own_page(tiny_model_path: Path) -> None:
    nothing = replace(report_of(tiny_model_path), cases=())
    with pytest.raises(PageError):
        filled(OWN_PAGE.read_text(), [nothing])


def test_the_projects_own_page_has_a_place_for_the_goals(tiny_model_path: Path) -> None:
    page = OWN_PAGE.read_text()
    assert filled(page, [report_of(tiny_model_path)])[1] == ["goals", "fairness"]
    text, names = filled(page, [report_of(tiny_model_path, on_gpu=True)])
    assert names == ["goals-gpu"]
    assert (
        text.partition("<!-- bench: goals -->")[2][:999] == page.partition("<!-- bench: goals -->")[2][:999]
    )

"""Figures in a page, and plots, both made from reports and from nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.page import PageError, filled
from benchmarks.plots import PLOTS, draw

from .reports import report_of

PAGE = """# Title
<!-- bench: goals -->
old
<!-- end -->
between
<!-- bench: concurrency -->
<!-- end -->
<!-- bench: zipf -->
kept
<!-- end -->
<!-- bench: conditions -->
<!-- end -->
"""


def test_blocks_are_filled_and_the_rest_stays(tiny_model_path: Path) -> None:
    text, names = filled(PAGE, [report_of(tiny_model_path)])
    assert names == ["goals", "concurrency", "conditions"]
    lines = text.splitlines()
    assert "| ours ÷ theirs [x] | **3.00** | 2.00 to 4.00 | ≥ 3.5 | no | 2 |" in lines
    assert "| growth | **12.0%** | 6.00 to 24.0% | ≤ 12% | yes | 3 |" in lines
    assert "| mlx-graft, base, 4 requests | 12.0 | 1000 | 150 | 3 |" in lines
    assert "| mixed ÷ base | **0.62** | 0.50 to 0.75 |  |  | 2 |" in lines
    assert "- Note: a note" in lines
    assert "Of 3 answers of sides that were asked the same, 1 are equal, word for word." in lines
    assert "Failed: churn: it broke [off] its log" in lines
    assert "old" not in lines
    assert {"# Title", "between", "kept"} <= set(lines)
    assert filled(text, [report_of(tiny_model_path)])[0].count("ours ÷ theirs") == 1


def test_a_page_without_a_place_is_an_error(tiny_model_path: Path) -> None:
    with pytest.raises(PageError, match="expected a line <!-- bench: NAME -->"):
        filled("# Title\n", [report_of(tiny_model_path)])


def test_the_projects_own_page_has_a_place_for_the_goals(tiny_model_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
    _, names = filled(page.read_text(), [report_of(tiny_model_path)])
    assert names == ["conditions", "goals", "concurrency"]


def test_a_plot_depends_on_the_report_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    report = report_of(tiny_model_path)
    drawn = []
    for name in ("first", "again"):
        folder = tmp_path / name
        folder.mkdir()
        drawn.append(draw(report, folder))
    (first,), (again,) = drawn
    assert first.name == "concurrency.svg"
    assert first.read_bytes() == again.read_bytes()
    texts = "".join(ElementTree.parse(first).getroot().itertext())
    for text in (
        "requests at once",
        "tokens/s",
        "mlx-graft, mixed",
        "tiny, F32",
        f"{report.created:%Y-%m-%d}",
    ):
        assert text in texts
    assert set(PLOTS) >= {"concurrency", "distinct", "registered", "latency", "loading", "fairness"}

"""Figures in a page, and plots, both made from reports and from nothing else."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.gpu_report import read_gpu_report
from benchmarks.page import PageError, filled
from benchmarks.plots import PLOTS, draw
from benchmarks.report import ReportError

from .reports import report_of

OWN_PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
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
"""


def test_blocks_are_filled_and_the_rest_stays(tiny_model_path: Path) -> None:
    report = report_of(tiny_model_path)
    text, names = filled(PAGE, [report])
    assert names == ["goals", "concurrency"]
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
    assert names == ["concurrency"]
    assert "<!-- bench: goals -->\nold\n" in text


def test_each_block_says_which_run_it_is_of(tiny_model_path: Path) -> None:
    first = report_of(tiny_model_path)
    second = first.model_copy(
        update={"command": "mlx-graft bench concurrency", "seconds": 99.0, "cases": first.cases[1:2]}
    )
    text, _ = filled(PAGE, [first, second])
    goals, concurrency = (
        text.partition(f"<!-- bench: {name} -->\n")[2].partition("<!-- end -->")[0]
        for name in ("goals", "concurrency")
    )
    for block, report, seconds in ((goals, first, 12), (concurrency, second, 99)):
        run = f"Run of {report.created:%Y-%m-%d %H:%M} UTC. Command: {report.command}"
        assert f"<summary>{run}</summary>\n\nValues of a measure are " in block
        assert block.count("Run of") == block.count("Model: tiny, F32.") == 1
        assert f"took {seconds} seconds. Note: a note\n\n</details>\n" in block


@pytest.mark.parametrize("page", ["# Title\n", "<!-- bench: zipf -->\n<!-- end -->\n"])
def test_a_page_without_a_place_is_an_error(tiny_model_path: Path, page: str) -> None:
    with pytest.raises(PageError, match="expected a line <!-- bench: NAME -->"):
        filled(page, [report_of(tiny_model_path)])


def test_reports_without_figures_are_an_error_on_the_projects_own_page(tiny_model_path: Path) -> None:
    nothing = report_of(tiny_model_path).model_copy(update={"cases": []})
    with pytest.raises(PageError):
        filled(OWN_PAGE.read_text(), [nothing])


GPU = {
    "created": "2026-01-02T03:04:05+00:00",
    "environment": {"device": "A | GPU", "mlx": "0.1"},
    "options": {"rank": 16, "blocks": 3, "steps": 4, "models": ["1b"], "json": "gpu.json"},
    "results": [
        {
            "model": "1b",
            "rows": 8,
            "adapters": 8,
            "side": "fused",
            "step_ms": 1.234,
            "ratio": 0.956,
            "lowest": 0.9,
            "highest": 1.0,
        }
    ],
    "profiles": [
        {"model": "1b", "rows": 8, "side": "base", "build_ms": 1.5, "submit_ms": 2.25, "wait_ms": 0.0}
    ],
}


def test_the_block_about_a_gpu_is_filled_from_its_own_report(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(GPU))
    text, names = filled(OWN_PAGE.read_text(), [], read_gpu_report(file))
    assert names == ["gpu"]
    lines = text.splitlines()
    options = "models ['1b'], rank 16, blocks 3, steps 4"
    assert f"Run of 2026-01-02 03:04 UTC: device A \\| GPU, mlx 0.1; {options}." in lines
    assert "| 1b, base | 8 | 1.50 | 2.25 | 0.00 |" in lines
    assert "| 1b, fused | 8 | 8 | 1.23 | **0.96** | 0.90 to 1.00 |" in lines
    file.write_text(json.dumps({**GPU, "results": [{"model": "1b"}]}))
    with pytest.raises(ReportError, match=r"benchmarks\.gpu in gpu\.json, but results\.0\.rows: "):
        read_gpu_report(file)


def test_the_projects_own_page_has_a_place_for_the_goals(tiny_model_path: Path) -> None:
    _, names = filled(OWN_PAGE.read_text(), [report_of(tiny_model_path)])
    assert names == ["goals", "concurrency"]


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

"""The benchmark of fusing on a tiny model: its figures are those of the core, its tables are in the page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.fusing.fusion import AUTO_THRESHOLD, Precision
from benchmarks.fusing import base_model, fused_results, in_float32, write_page
from benchmarks.fusing_report import (
    FusingReport,
    FusingResult,
    merged_report,
    per_adapter_block,
    read_fusing_report,
)
from benchmarks.page import PageError
from benchmarks.report import ReportError
from tests.adapters.support import write_model
from tests.models import logits, make_adapter, relative_error, snapshot, tiny_llama

ROWS = [[3, 5, 40, 17], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.mark.parametrize("base", ["bf16", "4"])
def test_the_figures_are_the_cores(folder: Path, tmp_path: Path, base: str) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_llama(), size=0.1)
    model = base_model(folder, base)
    before = snapshot(model)
    results = list(fused_results(model, base, adapter, ROWS, AUTO_THRESHOLD))
    assert snapshot(model) == before
    assert [result.precision for result in results] == list(get_args(Precision))
    found = {result.precision: result for result in results}
    container = AdapterContainer.from_directory(adapter)
    for precision in get_args(Precision):
        report = container.fused_modules(model, precision)[1]
        result = found[precision]
        assert (result.forms, result.bytes_after) == (report.precision, report.bytes_after)
        assert result.delta_error_mean == pytest.approx(report.error_mean)
    assert (found["keep"].output_error_worst, found["keep"].agreement) == (0.0, 1.0)
    assert {result.tokens for result in results} == {6}
    if base == "4":
        assert found["auto"].output_error_mean < found["requantize"].output_error_mean
    else:
        assert found["auto"].output_error_mean == found["dequantize"].output_error_mean > 0


def test_the_twin_in_float32_has_the_same_weights(folder: Path) -> None:
    model = base_model(folder, "4")
    assert relative_error(logits(in_float32(model)), logits(model)) < 1e-4
    np.testing.assert_array_equal(logits(in_float32(in_float32(model))), logits(in_float32(model)))


def _result(base: str, adapter: str, precision: str, error: float, tokens: int) -> FusingResult:
    return FusingResult(
        base=base, precision=precision, adapter=adapter, modules=2, forms={"requantized": 1, "kept_dense": 1},
        delta_error_mean=error, delta_error_worst=2 * error, output_error_mean=error,
        output_error_worst=error, tokens=tokens, agreement=0.5, kl_mean=0.25, kl_max=1.0,
        bytes_before=2**20, bytes_after=2**21,
    )  # fmt: skip


def test_tables_are_put_into_the_page_and_the_report_is_read_back(tmp_path: Path) -> None:
    report = FusingReport(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        model="tiny",
        environment={"mlx": "1"},
        options={"prompts": "2"},
        results=[
            _result("4 bits", "b", "auto", 0.02, 10),
            _result("4 bits", "a", "auto", 0.04, 30),
            _result("8 bits", "a", "keep", 0.0, 30),
        ],
        seconds=3.2,
    )
    file = tmp_path / "report.json"
    file.write_text(report.model_dump_json())
    assert read_fusing_report(file) == report
    twice = merged_report([report, report])
    assert (len(twice.results), twice.seconds) == (6, pytest.approx(6.4))
    with pytest.raises(ReportError, match="the same options"):
        merged_report([report, report.model_copy(update={"model": "other"})])
    names = ("fusing-precisions", "fusing-adapters", "fusing-conditions")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench: {name} -->\nold\n<!-- end -->\n" for name in names))
    write_page(page, report)
    text = page.read_text()
    assert "old" not in text
    row = "| 4 bits | `auto` | 2 as the base, 2 dense | 3.00 % | 8.00 % | 3.00 % | 4.00 % | 50.0 % | 0.2500 |"
    assert row in text
    assert text.count("| 2.0 | 4.0 |") == 1
    assert per_adapter_block(report, "4 bits").index("| a |") < per_adapter_block(report, "4 bits").index(
        "| b |"
    )
    page.write_text("nothing to fill")
    with pytest.raises(PageError):
        write_page(page, report)
    file.write_text("{}")
    with pytest.raises(ReportError, match="a report of benchmarks"):
        read_fusing_report(file)

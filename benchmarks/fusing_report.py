"""The report of `benchmarks.fusing`: its records, its file, and its tables in Markdown. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.page import table
from benchmarks.report import ReportError

__all__ = [
    "FusingReport",
    "FusingResult",
    "conditions_block",
    "merged_report",
    "per_adapter_block",
    "precisions_block",
    "read_fusing_report",
]

_MEBIBYTE = 2**20
_FORMS = {
    "dense": "dense",
    "requantized": "as the base",
    "requantized_8bit": "with 8 bits",
    "kept_dense": "dense",
    "unmerged": "unmerged",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class FusingResult(_Record):
    """One adapter fused into one base: `base` names its weights, `forms` counts layers.

    The delta's errors are of weights, the outputs' of layers on prompts; KL is in nats. Bytes are those of
    the adapted layers.
    """

    base: str
    precision: str
    adapter: str
    modules: int
    forms: dict[str, int]
    delta_error_mean: float
    delta_error_worst: float
    output_error_mean: float
    output_error_worst: float
    tokens: int
    agreement: float
    kl_mean: float
    kl_max: float
    bytes_before: int
    bytes_after: int


class FusingReport(_Record):
    """A whole run; `environment` and `options` are by name."""

    created: datetime
    model: str
    environment: dict[str, str]
    options: dict[str, str]
    results: list[FusingResult]
    seconds: float


def read_fusing_report(path: Path) -> FusingReport:
    """Raises: ReportError if the file is no such report; OSError."""
    try:
        return FusingReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"expected a report of benchmarks.fusing in {path.name}, but {place or 'the file'}: "
            f"{first['msg']}. "
            f"Make it anew with python -m benchmarks.fusing --json {path.name}"
        ) from error


def merged_report(reports: Sequence[FusingReport]) -> FusingReport:
    """One report of several runs, such as one for each base; the conditions are those of the first.

    Raises: ReportError if they differ in anything but what was measured.
    """
    first = reports[0]
    if any(
        (one.model, one.environment, one.options) != (first.model, first.environment, first.options)
        for one in reports
    ):
        raise ReportError("expected reports of one model, one machine and the same options, got others")
    results = [result for one in reports for result in one.results]
    return first.model_copy(update={"results": results, "seconds": sum(one.seconds for one in reports)})


def precisions_block(report: FusingReport) -> str:
    """A line for each base and precision, over all adapters: means, worst ones, and sums of bytes."""
    groups: dict[tuple[str, str], list[FusingResult]] = {}
    for result in report.results:
        groups.setdefault((result.base, result.precision), []).append(result)
    rows = [(base, f"`{precision}`", *_cells(found)) for (base, precision), found in groups.items()]
    return table(("base", "precision", *_HEADINGS), rows)


def per_adapter_block(report: FusingReport, base: str) -> str:
    """A line for each adapter and precision on one base."""
    rows = [
        (result.adapter, f"`{result.precision}`", *_cells([result]))
        for result in sorted(report.results, key=lambda one: one.adapter)
        if result.base == base
    ]
    return table(("adapter", "precision", *_HEADINGS), rows)


def conditions_block(report: FusingReport) -> str:
    """What the figures depend on."""
    environment = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    options = "; ".join(f"{name}: {value}" for name, value in report.options.items())
    return (
        f"Run of {report.created:%Y-%m-%d %H:%M} UTC, {report.seconds:.0f} seconds, of {report.model}; "
        f"{options}; {environment}."
    )


_HEADINGS = (
    *("layers", "delta error, mean", "worst", "output error, mean", "worst"),
    *("same token", "KL mean", "KL max", "MiB before", "after"),
)


def _cells(results: Sequence[FusingResult]) -> tuple[str, ...]:
    forms: Counter[str] = Counter()
    for result in results:
        for form, count in result.forms.items():
            forms[_FORMS[form]] += count
    tokens = sum(result.tokens for result in results)
    agreement = sum(result.agreement * result.tokens for result in results) / tokens
    kl_mean = sum(result.kl_mean * result.tokens for result in results) / tokens
    return (
        ", ".join(f"{count} {form}" for form, count in forms.items()),
        _percent(fmean(result.delta_error_mean for result in results)),
        _percent(max(result.delta_error_worst for result in results)),
        _percent(fmean(result.output_error_mean for result in results)),
        _percent(max(result.output_error_worst for result in results)),
        _percent(agreement),
        _nats(kl_mean),
        _nats(max(result.kl_max for result in results)),
        f"{sum(result.bytes_before for result in results) / _MEBIBYTE:.1f}",
        f"{sum(result.bytes_after for result in results) / _MEBIBYTE:.1f}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def _nats(value: float) -> str:
    return f"{value:.4f}" if value >= 5e-5 else "0"

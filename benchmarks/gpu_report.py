"""The report of `benchmarks.gpu`, read back from its file. Reading it needs no GPU."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.report import ReportError

__all__ = ["GpuProfile", "GpuReport", "GpuResult", "read_gpu_report"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class GpuResult(_Record):
    """Milliseconds of a decode step of a side, and base ÷ side: the median of its turns and their bounds."""

    model: str
    rows: int
    adapters: int
    side: str
    step_ms: float
    ratio: float
    lowest: float
    highest: float


class GpuProfile(_Record):
    """Where the host's milliseconds of a decode step go: building the graph, handing it over, waiting."""

    model: str
    rows: int
    side: str
    build_ms: float
    submit_ms: float
    wait_ms: float


class GpuReport(_Record):
    """A whole run; `environment` and `options` are by name."""

    created: datetime
    environment: dict[str, Any]
    options: dict[str, Any]
    results: list[GpuResult]
    profiles: list[GpuProfile] = []


def read_gpu_report(path: Path) -> GpuReport:
    """Raises: ReportError if the file is no such report; OSError."""
    try:
        return GpuReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"expected a report of benchmarks.gpu in {path.name}, but {place or 'the file'}: {first['msg']}. "
            f"Make it anew with python -m benchmarks.gpu --json {path.name}"
        ) from error

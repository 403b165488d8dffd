"""The load reports of versions, beside the base that is served. Pure but for the log."""

from __future__ import annotations

import structlog

from adapters_core.report import LoadReport
from server.engine.model import ModelInfo

from .registry import Registry, Version

__all__ = ["log_warnings", "report_on"]

_log = structlog.get_logger(__name__)


def report_on(version: Version, registry: Registry, info: ModelInfo) -> LoadReport | None:
    """What a version's files brought, with a warning if they name another base than this one."""
    report = version.resident.report
    return None if report is None else report.beside((info.model_id, info.path.name, registry.base))


def log_warnings(adapter_id: str, version: Version, registry: Registry, info: ModelInfo) -> None:
    """One line for each warning of the report."""
    report = report_on(version, registry, info)
    for warning in () if report is None else report.warnings:
        _log.warning("adapter_report", adapter=adapter_id, version=version.number, warning=warning)

"""What is told of loads: lines in the log, warnings of load reports, seconds for the metrics."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from adapters_core.report import LoadReport
from server.engine.model import ModelInfo

from .registry import Registry
from .versions import Version

__all__ = ["Journal", "report_on"]

_log = structlog.get_logger(__name__)


def report_on(version: Version, registry: Registry, info: ModelInfo) -> LoadReport | None:
    """What a version's files brought, with a warning if they name another base than this one."""
    report = version.resident.report
    return None if report is None else report.beside((info.model_id, info.path.name, registry.base))


class Journal:
    """Of the loads beside one base; `on_load` is told how many seconds each took."""

    def __init__(self, registry: Registry, info: ModelInfo, on_load: Callable[[float], None]) -> None:
        self._registry = registry
        self._info = info
        self._on_load = on_load

    def loaded(self, adapter_id: str, version: Version) -> None:
        """A call, a request or the watch made `version` what an id means."""
        self._on_load(version.load_seconds)
        digest = version.resident.digest
        _log.info("adapter_loaded", adapter=adapter_id, version=version.number, digest=digest)
        self._warn(adapter_id, version)

    def reloaded(self, seconds: float) -> None:
        """A version came back into memory, or its successor came."""
        self._on_load(seconds)

    def changed(self, adapter_id: str, version: Version, before: Version) -> None:
        """The folder of `before` held something else when that was to come back: `version`."""
        _log.warning(
            "adapter_folder_changed",
            adapter=adapter_id,
            version=version.number,
            digest=version.resident.digest,
            before=before.resident.digest,
        )
        self._warn(adapter_id, version)

    def _warn(self, adapter_id: str, version: Version) -> None:
        report = report_on(version, self._registry, self._info)
        for warning in () if report is None else report.warnings:
            _log.warning("adapter_report", adapter=adapter_id, version=version.number, warning=warning)

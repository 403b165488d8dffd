"""Fusing an adapter into the resident base, undoing that, and writing a fused model to a folder.

The fused layers are computed on a worker thread, beside the base's own and without touching them. Only then
are new requests held back, those in flight awaited, and layers exchanged, on the generation thread. Knows
names through the registry alone. Runs on the event loop where nothing else is said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import structlog

from adapters_core.bank import ResidentAdapter
from adapters_core.container import AdapterContainer
from adapters_core.fusion import FuseReport, Precision
from adapters_core.surgery import replace_modules
from server.engine.container import ModelContainer, ModelContext
from server.engine.model import ModelInfo

from .aside import run_aside
from .errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterNotFusedError,
    AdaptersLoadedError,
    BaseIsFusedError,
    quoted,
)
from .gate import Gate
from .registry import Entry, Registry
from .residency import Residency
from .saving import SavedModels, bare_copy

__all__ = ["FuseResult", "Fuser", "Precision"]

_log = structlog.get_logger(__name__)

AwaitIdle = Callable[[Callable[[], int], float, str], Awaitable[None]]
"""Waits until a count is 0, at most so many seconds; says in the error what is in use."""


@dataclass(frozen=True, slots=True)
class FuseResult:
    """What was fused, how well, and how long it took; `saved_to` names the folder under the models root."""

    id: str
    report: FuseReport
    seconds: float
    saved_to: str | None = None


@dataclass(frozen=True, slots=True)
class _Fused:
    """The adapter that is fused: what brings it back into the bank, and the layers that are in the base."""

    adapter: AdapterContainer
    modules: Mapping[str, nn.Module]
    mark: str


class Fuser:
    """At most one adapter is fused into the base in `container`."""

    def __init__(
        self,
        container: ModelContainer,
        info: ModelInfo,
        registry: Registry,
        residency: Residency,
        gate: Gate,
        idle: AwaitIdle,
        models_dir: Path | None,
    ) -> None:
        self._container = container
        self._info = info
        self._registry = registry
        self._residency = residency
        self._gate = gate
        self._idle = idle
        self._models = SavedModels(models_dir)
        self._fused: _Fused | None = None

    async def fuse(
        self, adapter_id: str, precision: Precision, unload_others: bool, timeout_seconds: float
    ) -> FuseResult:
        """Put layers with the adapter merged in into the base; the other adapters are unloaded.

        Raises:
            AdapterNotFoundError, BaseIsFusedError, AdaptersLoadedError: the state does not allow it.
            AdapterBusyError: requests in flight did not end in time, or an adapter is being unloaded.
            AdapterChangedError, InvalidAdapterError: its folder does not hold what was loaded.
        """
        started = time.perf_counter()
        async with self._gate.shared():
            entry = self._ready(adapter_id, unload_others)
            version = entry.current
            adapter = await run_aside(_read_again, entry)
            modules, report = await self._fused_modules(adapter, precision)
        async with self._gate.alone():
            if self._ready(adapter_id, unload_others).current is not version:
                raise AdapterChangedError(adapter_id)
            await self._idle(lambda: self._registry.in_flight, timeout_seconds, "the base")
            # The same adapter at another precision is another base.
            fused = _Fused(adapter, modules, f"{adapter.digest}@{precision}")
            try:
                await self._container.update(lambda context: _install(context, fused), drain=True)
            except BaseException:
                await self._forget_what_left()
                raise
            self._residency.clear()
            self._fused = fused
            for other in self._registry.entries:
                if other is not entry:
                    self._registry.remove(other)
            entry.retired = []
            entry.state = "fused"
            self._registry.fused = adapter_id
        _log.info("adapter_fused", adapter=adapter_id, precision=report.precision, error=report.error_mean)
        return FuseResult(adapter_id, report, time.perf_counter() - started)

    async def save(self, adapter_id: str, precision: Precision, name: str) -> FuseResult:
        """Write the base with the adapter merged in to a new model folder; the resident base is not touched.

        Raises:
            AdapterNotFoundError, BaseIsFusedError, AdapterChangedError, InvalidAdapterError: as `fuse`.
            PathNotAllowedError: the server has no models root, or `name` is not that of a folder in it.
            ModelExistsError: there is one of this name.
        """
        started = time.perf_counter()
        async with self._gate.shared():
            entry = self._ready(adapter_id, unload_others=True)
            await asyncio.to_thread(self._models.check, name)
            adapter = await run_aside(_read_again, entry)
            modules, report = await self._fused_modules(adapter, precision)
            copy = await self._container.perform(lambda context: bare_copy(context.model))
            replace_modules(copy, modules)
            await run_aside(self._models.write, name, copy, self._info)
        _log.info("fused_model_saved", adapter=adapter_id, name=name, precision=report.precision)
        return FuseResult(adapter_id, report, time.perf_counter() - started, saved_to=name)

    async def unfuse(self, adapter_id: str, timeout_seconds: float) -> Entry:
        """Put the base's own layers back, the very ones, and the adapter into the bank.

        Raises:
            AdapterNotFoundError: it is not loaded.
            AdapterNotFusedError: it is not the one that is fused.
            AdapterBusyError: requests in flight did not end in time.
        """
        async with self._gate.alone():
            entry = self._registry.get(adapter_id)
            fused = self._fused
            if fused is None or self._registry.fused != adapter_id:
                raise AdapterNotFusedError(adapter_id, self._registry.fused)
            await self._idle(lambda: self._registry.in_flight, timeout_seconds, "the base")
            entry.current.resident = await self._container.update(
                lambda context: _take_out(context, fused), drain=True
            )
            self._residency.put(entry.current)
            self._fused = None
            entry.state = "ready"
            self._registry.fused = None
        _log.info("adapter_unfused", adapter=adapter_id)
        return entry

    def _ready(self, adapter_id: str, unload_others: bool) -> Entry:
        entry = self._registry.get(adapter_id)
        if self._registry.fused is not None:
            raise BaseIsFusedError(self._registry.fused, "nothing else can be fused")
        draining = [other for other in self._registry.entries if other.state == "draining"]
        if draining:
            names = quoted(draining[0].id)
            raise AdapterBusyError(
                f"Adapter {names} is being unloaded. Try again when it is gone.", draining[0].in_flight
            )
        others = [other.id for other in self._registry.entries if other is not entry]
        if others and not unload_others:
            raise AdaptersLoadedError(adapter_id, others)
        return entry

    async def _fused_modules(
        self, adapter: AdapterContainer, precision: Precision
    ) -> tuple[dict[str, nn.Module], FuseReport]:
        model = await self._container.perform(lambda context: context.model)
        return await run_aside(adapter.fused_modules, model, precision)

    async def _forget_what_left(self) -> None:
        """A fusion that failed may have emptied the bank: what is not there comes back when it is named."""
        present = await self._container.perform(lambda context: context.bank.residents)
        for version in self._residency.versions:
            if version.resident not in present:
                self._residency.drop(version)


def _read_again(entry: Entry) -> AdapterContainer:
    """The adapter as it was loaded, from its folder. Runs on a worker thread."""
    adapter = AdapterContainer.from_directory(entry.current.folder.path)
    if adapter.digest != entry.current.resident.digest:
        raise AdapterChangedError(entry.id)
    return adapter


def _install(context: ModelContext, fused: _Fused) -> None:
    """Empty the bank and exchange the layers. Runs on the generation thread, with no request in flight."""
    context.bank.close()
    context.fusion = replace_modules(context.model, fused.modules)
    context.fused_digest = fused.mark
    context.prompt_cache.clear()  # all of it was computed with the base as it was


def _take_out(context: ModelContext, fused: _Fused) -> ResidentAdapter:
    """Undo `_install` for the base and the fused adapter. Runs on the generation thread, likewise."""
    stale = context.cache_key(())
    context.fusion.undo()
    try:
        resident = context.bank.add(fused.adapter)
    except BaseException:
        context.fusion = replace_modules(context.model, fused.modules)
        raise
    context.fusion = None
    context.fused_digest = None
    context.prompt_cache.drop(lambda key: key == stale)
    return resident

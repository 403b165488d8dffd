"""Fusing adapters into the resident base, undoing that, and writing a fused model to a folder.

The fused layers are computed and compared on a worker thread, beside the base's own and without touching
them. Only then are new requests held back, those in flight awaited, and layers exchanged, on the generation
thread. Knows names through the registry alone. Runs on the event loop where nothing else is said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import structlog

from adapters_core.bank import ResidentAdapter, make_row
from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError
from adapters_core.fusing.activations import ActivationReport
from adapters_core.fusing.fusion import AUTO_THRESHOLD, FuseReport, Precision
from adapters_core.layers.surgery import replace_modules
from server.engine.container import ModelContainer, ModelContext
from server.engine.model import ModelInfo

from .aside import run_aside
from .blended import read_source
from .errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterNotFusedError,
    AdaptersLoadedError,
    BaseIsFusedError,
    UnmergedModelError,
    quoted,
)
from .fusing_work import FuseProgress, Merged, Stage, Tell, merge, no_tell
from .gate import Gate
from .probes import probe_rows
from .registry import Entry, Registry, Terms, Version
from .residency import Residency
from .saving import ModelDraft, SavedModels, bare_copy

__all__ = ["FuseOptions", "FuseProgress", "FuseResult", "Fuser", "Precision", "Tell", "no_tell"]

_log = structlog.get_logger(__name__)

_LOOK_SECONDS = 0.2

AwaitIdle = Callable[[Callable[[], int], float, str], Awaitable[None]]
"""Waits until a count is 0, at most so many seconds; says in the error what is in use."""


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """`models_dir` is where models are saved; `threshold` the relative error that "auto" keeps within."""

    models_dir: Path | None = None
    threshold: float = AUTO_THRESHOLD


@dataclass(frozen=True, slots=True)
class FuseResult:
    """What was fused, how well, and how long it took; `saved_to` names the folder under the models root."""

    id: str
    terms: Terms
    report: FuseReport
    activations: ActivationReport
    seconds: float
    saved_to: str | None = None


@dataclass(frozen=True, slots=True)
class _Sum:
    """What is to be fused: entries, each once, and weights; `versions` are what they mean at this instant."""

    entries: tuple[Entry, ...]
    weights: tuple[float, ...]
    versions: tuple[Version, ...]

    @property
    def is_alone(self) -> bool:
        """One adapter as it is: then the base answers as a request that names it would be answered."""
        return self.weights == (1.0,)

    @property
    def terms(self) -> Terms:
        return [(entry.id, weight) for entry, weight in zip(self.entries, self.weights, strict=True)]


@dataclass(frozen=True, slots=True)
class _Work:
    """Adapters that were read again, what came of merging them, and the copy of the module tree for that."""

    adapters: list[AdapterContainer]
    merged: Merged
    model: Any


@dataclass(frozen=True, slots=True)
class _Fused:
    """What is fused: the adapter that comes back into the bank (None for a sum), and its layers."""

    entries: tuple[Entry, ...]
    adapter: AdapterContainer | None
    modules: Mapping[str, nn.Module]
    mark: str


class Fuser:
    """At most one adapter, or one sum of adapters, is fused into the base in `container`."""

    def __init__(
        self,
        container: ModelContainer,
        info: ModelInfo,
        registry: Registry,
        residency: Residency,
        gate: Gate,
        idle: AwaitIdle,
        options: FuseOptions,
    ) -> None:
        self._container = container
        self._info = info
        self._registry = registry
        self._residency = residency
        self._gate = gate
        self._idle = idle
        self._threshold = options.threshold
        self._models = SavedModels(options.models_dir)
        self._fused: _Fused | None = None

    async def fuse(
        self,
        terms: Terms,
        precision: Precision,
        unload_others: bool,
        timeout_seconds: float,
        tell: Tell = no_tell,
    ) -> FuseResult:
        """Put layers with the (id, weight) terms merged in into the base; other adapters are unloaded.

        The first term is the one by which the fusion is known. `tell` hears how far the work is.

        Raises:
            AdapterNotFoundError, BaseIsFusedError, AdaptersLoadedError: the state does not allow it.
            BlendError: a weight of 0, or a DoRA that is weighted or not alone.
            AdapterBusyError: requests in flight did not end in time, or an adapter is being unloaded.
            AdapterChangedError, InvalidAdapterError: its folder does not hold what was loaded.
        """
        started = time.perf_counter()
        chosen, model, rows = await self._start(terms, unload_others)
        work = await self._work(chosen, model, rows, precision, tell)
        async with self._gate.alone():
            self._require_unchanged(chosen, self._ready(terms, unload_others))
            await self._idle(lambda: self._registry.in_flight, timeout_seconds, "the base")
            adapter = work.adapters[0] if chosen.is_alone else None
            fused = _Fused(
                chosen.entries, adapter, work.merged.modules, _mark(chosen, precision, self._threshold)
            )
            try:
                await self._container.update(lambda context: _install(context, fused), drain=True)
            except BaseException:
                await self._forget_what_left()
                raise
            self._residency.clear()
            self._fused = fused
            for other in self._registry.entries:
                if other not in chosen.entries:
                    self._registry.remove(other)
            for entry in chosen.entries:
                entry.retired = []
            self._registry.start_fused(chosen.entries, is_sum=not chosen.is_alone)
        return self._result("adapter_fused", chosen, work.merged, started)

    async def save(self, terms: Terms, precision: Precision, name: str, tell: Tell = no_tell) -> FuseResult:
        """Write the base with the terms merged in to a new model folder; the resident base is not touched.

        Raises:
            AdapterNotFoundError, BaseIsFusedError, BlendError, AdapterChangedError, InvalidAdapterError: as
                `fuse`.
            UnmergedModelError: "keep" leaves nothing that a model folder can hold.
            PathNotAllowedError: the server has no models root, or `name` is not that of a folder in it.
            ModelExistsError: there is one of this name.
            ModelNotSavedError: it cannot be written, and nothing of it is left.
        """
        started = time.perf_counter()
        if precision == "keep":
            raise UnmergedModelError
        chosen, model, rows = await self._start(terms, unload_others=True)
        draft = await asyncio.to_thread(self._models.draft, name)
        work = await self._work(chosen, model, rows, precision, tell)
        replace_modules(work.model, work.merged.modules)
        await self._write(draft, work.model, chosen.entries[0].id, tell)
        return self._result("fused_model_saved", chosen, work.merged, started, name)

    async def unfuse(self, adapter_id: str, timeout_seconds: float) -> Entry:
        """Put the base's own layers back, the very ones, and the adapter into the bank.

        The adapters of a sum come back into memory when they are named next.

        Raises:
            AdapterNotFoundError: it is not loaded.
            AdapterNotFusedError: it is not the one that is fused.
            AdapterBusyError: requests in flight did not end in time.
        """
        self._require_fused(adapter_id)  # before the gate, which holds every request up
        async with self._gate.alone():
            entry, fused = self._require_fused(adapter_id)
            await self._idle(lambda: self._registry.in_flight, timeout_seconds, "the base")
            resident = await self._container.update(lambda context: _take_out(context, fused), drain=True)
            if resident is not None:
                entry.current.resident = resident
                self._residency.put(entry.current)
            self._fused = None
            self._registry.end_fused(fused.entries)
        _log.info("adapter_unfused", adapter=adapter_id)
        return entry

    def _require_fused(self, adapter_id: str) -> tuple[Entry, _Fused]:
        entry = self._registry.get(adapter_id)
        if self._fused is None or self._registry.fused != adapter_id:
            raise AdapterNotFusedError(adapter_id, self._registry.fused)
        return entry, self._fused

    async def _start(self, terms: Terms, unload_others: bool) -> tuple[_Sum, Any, list[list[int]]]:
        """What is to be fused, a copy of the bare module tree, and prompts to compare with.

        Only this passes the gate: what is computed from the copy is not disturbed by any change of the model.
        """
        async with self._gate.shared():
            chosen = self._ready(terms, unload_others)
            model, rows = await self._container.perform(
                lambda context: (
                    bare_copy(context.model),
                    probe_rows(context.tokenizer, self._info.context_tokens),
                )
            )
        return chosen, model, rows

    def _ready(self, terms: Terms, unload_others: bool) -> _Sum:
        weights: dict[str, float] = {}
        for adapter_id, weight in terms:
            weights[adapter_id] = weights.get(adapter_id, 0.0) + weight
        entries = tuple(self._registry.get(adapter_id) for adapter_id in weights)
        if self._registry.fused is not None:
            raise BaseIsFusedError(self._registry.fused, "nothing else can be fused")
        draining = [other for other in self._registry.entries if other.state == "draining"]
        if draining:
            names = quoted(draining[0].id)
            raise AdapterBusyError(
                f"Adapter {names} is being unloaded. Try again when it is gone.", draining[0].in_flight
            )
        versions = tuple(entry.current for entry in entries)
        row = make_row(zip((version.resident for version in versions), weights.values(), strict=True))
        if len(row) < len(entries):
            raise BlendError("a weight of 0 fuses nothing; leave that adapter out")
        others = [other.id for other in self._registry.entries if other not in entries]
        if others and not unload_others:
            raise AdaptersLoadedError(entries[0].id, others)
        return _Sum(entries, tuple(weights.values()), versions)

    @staticmethod
    def _require_unchanged(chosen: _Sum, now: _Sum) -> None:
        for entry, version, current in zip(chosen.entries, chosen.versions, now.versions, strict=True):
            if version is not current:
                raise AdapterChangedError(entry.id)

    async def _work(
        self, chosen: _Sum, model: Any, rows: list[list[int]], precision: Precision, tell: Tell
    ) -> _Work:
        """Read, merge and compare; nothing that is served changes."""
        name = chosen.entries[0].id
        adapters = await run_aside(_read_again, chosen, model)
        terms = list(zip(adapters, chosen.weights, strict=True))
        tell = _on_loop(tell, name)
        merged = await run_aside(merge, model, terms, precision, self._threshold, rows, name, tell)
        return _Work(adapters, merged, model)

    async def _write(self, draft: ModelDraft, model: Any, adapter_id: str, tell: Tell) -> None:
        """Write a model folder, and look now and then how much of it there is."""
        tell = _on_loop(tell, adapter_id)
        total_bytes, written_bytes = draft.expected_bytes(model), 0
        writing = asyncio.ensure_future(run_aside(draft.write, model, self._info))
        while not writing.done():
            found_bytes = await asyncio.to_thread(draft.written_bytes)
            # Files have headers, which the total leaves out; and in the end the folder has another name.
            written_bytes = max(written_bytes, min(found_bytes, total_bytes))
            tell(FuseProgress("writing", written_bytes, total_bytes))
            await asyncio.wait({writing}, timeout=_LOOK_SECONDS)
        await writing
        tell(FuseProgress("writing", total_bytes, total_bytes))

    def _result(
        self, event: str, chosen: _Sum, merged: Merged, started: float, saved_to: str | None = None
    ) -> FuseResult:
        report, activations = merged.report, merged.activations
        seconds = time.perf_counter() - started
        _log.info(
            event,
            adapter=chosen.entries[0].id,
            terms=list(chosen.terms),
            saved_to=saved_to,
            precision=report.precision,
            error=report.error_mean,
            agreement=activations.agreement,
            kl=activations.kl_mean,
            seconds=round(seconds, 3),
        )
        return FuseResult(chosen.entries[0].id, chosen.terms, report, activations, seconds, saved_to)

    async def _forget_what_left(self) -> None:
        """A fusion that failed may have emptied the bank: what is not there comes back when it is named."""
        present = await self._container.perform(lambda context: context.bank.residents)
        for version in self._residency.versions:
            if version.resident not in present:
                self._residency.drop(version)


def _read_again(chosen: _Sum, model: nn.Module) -> list[AdapterContainer]:
    """The adapters as they were loaded, from where they came. Runs on a worker thread."""
    adapters = []
    for entry, version in zip(chosen.entries, chosen.versions, strict=True):
        adapter = read_source(version.source, model, entry.id)
        if adapter.digest != version.resident.digest:
            raise AdapterChangedError(entry.id)
        adapters.append(adapter)
    return adapters


def _mark(chosen: _Sum, precision: Precision, threshold: float) -> str:
    """What tells this fused base from any other: the same adapters at another precision are another base."""
    pairs = zip(chosen.versions, chosen.weights, strict=True)
    terms = "+".join(f"{weight!r}*{version.resident.digest}" for version, weight in pairs)
    return f"{terms}@{precision}@{threshold!r}"


def _on_loop(tell: Tell, adapter_id: str) -> Tell:
    """`tell` for calls from any thread; the beginning of each stage is logged."""
    loop = asyncio.get_running_loop()
    stages: set[Stage] = set()

    def hear(progress: FuseProgress) -> None:
        if progress.stage not in stages:
            stages.add(progress.stage)
            _log.info("fuse_progress", adapter=adapter_id, stage=progress.stage, total=progress.total)
        tell(progress)

    return lambda progress: loop.call_soon_threadsafe(hear, progress) and None


def _install(context: ModelContext, fused: _Fused) -> None:
    """Empty the bank and exchange the layers. Runs on the generation thread, with no request in flight."""
    context.bank.close()
    context.fusion = replace_modules(context.model, fused.modules)
    context.fused_digest = fused.mark
    context.prompt_cache.clear()  # all of it was computed with the base as it was


def _take_out(context: ModelContext, fused: _Fused) -> ResidentAdapter | None:
    """Undo `_install` for the base and an adapter fused alone. Runs on the generation thread, likewise."""
    stale = context.cache_key(())
    context.fusion.undo()
    try:
        resident = None if fused.adapter is None else context.bank.add(fused.adapter)
    except BaseException:
        context.fusion = replace_modules(context.model, fused.modules)
        raise
    context.fusion = None
    context.fused_digest = None
    context.prompt_cache.drop(lambda key: key == stale)
    return resident

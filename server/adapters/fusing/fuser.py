"""Fusing adapters into the resident base, undoing that, and writing a fused model to a folder, step by step.

The fused layers are computed and compared on a worker thread, beside the base's own and without touching
them. Only then are new requests held back, those in flight awaited, and layers exchanged, on the generation
thread. Knows names through the registry alone. Runs on the event loop where nothing else is said.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from adapters_core.container import AdapterContainer
from adapters_core.fusing.activations import ActivationReport
from adapters_core.fusing.fusion import AUTO_THRESHOLD, FuseReport, Precision
from adapters_core.layers.surgery import replace_modules
from server.engine.container import ModelContainer
from server.engine.model import ModelInfo

from ..aside import Aside
from ..bare import bare_copy
from ..errors import AdapterNotFusedError, UnmergedModelError
from ..gate import Gate
from ..memory.residency import Residency
from ..pins import Terms
from ..registry import Registry
from ..saving.folders import MODELS, SavedFolders
from ..saving.models import ModelDraft
from ..unloading import Unloader
from ..versions import Entry
from .choice import Choice, choose
from .exchange import FusedLayers, install, take_out
from .merging import Merged, merge
from .probes import probe_rows
from .progress import FuseProgress, Tell, no_tell, on_loop
from .quiet import QuietBase

__all__ = ["FuseOptions", "FuseResult", "Fuser"]

_log = structlog.get_logger(__name__)

_LOOK_SECONDS = 0.2


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
class _Work:
    """Adapters that were read again, what came of merging them, and the copy of the module tree for that."""

    adapters: list[AdapterContainer]
    merged: Merged
    model: Any


@dataclass(frozen=True, slots=True)
class _Fused:
    """What is fused now, by entry, and its layers."""

    entries: tuple[Entry, ...]
    layers: FusedLayers


class Fuser:
    """At most one adapter, or one sum of adapters, is fused into the base in `container`."""

    def __init__(
        self,
        aside: Aside,
        container: ModelContainer,
        info: ModelInfo,
        registry: Registry,
        residency: Residency,
        gate: Gate,
        unloader: Unloader,
        options: FuseOptions,
    ) -> None:
        self._aside = aside
        self._container = container
        self._info = info
        self._registry = registry
        self._residency = residency
        self._gate = gate
        self._unloader = unloader
        self._quiet = QuietBase(registry, gate, unloader)
        self._threshold = options.threshold
        self._folders = SavedFolders(options.models_dir, MODELS)
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
        adapter = work.adapters[0] if chosen.is_alone else None
        layers = FusedLayers(work.merged.modules, adapter, chosen.mark(precision, self._threshold))

        def check() -> None:
            chosen.require_same(choose(self._registry, terms, unload_others))

        async with self._quiet.alone(timeout_seconds, check):
            try:
                await self._container.update(lambda context: install(context, layers), drain=True)
            except BaseException:
                await self._forget_what_left()
                raise
            self._note_fused(chosen, layers)
        return _result("adapter_fused", chosen, work.merged, started)

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
        draft = await asyncio.to_thread(ModelDraft, self._folders, name)
        work = await self._work(chosen, model, rows, precision, tell)
        replace_modules(work.model, work.merged.modules)
        await self._write(draft, work.model, chosen.name, tell)
        return _result("fused_model_saved", chosen, work.merged, started, name)

    async def unfuse(self, adapter_id: str, timeout_seconds: float) -> Entry:
        """Put the base's own layers back, the very ones, and the adapter into the bank.

        The adapters of a sum come back into memory when they are named next.

        Raises:
            AdapterNotFoundError: it is not loaded.
            AdapterNotFusedError: it is not the one that is fused.
            AdapterBusyError: requests in flight did not end in time.
        """
        self._require_fused(adapter_id)  # before the gate, which holds every request up
        async with self._quiet.alone(timeout_seconds, lambda: self._require_fused(adapter_id) and None):
            entry, fused = self._require_fused(adapter_id)
            resident = await self._container.update(
                lambda context: take_out(context, fused.layers), drain=True
            )
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

    async def _start(self, terms: Terms, unload_others: bool) -> tuple[Choice, Any, list[list[int]]]:
        """What is to be fused, a copy of the bare module tree, and prompts to compare with.

        Only this passes the gate: what is computed from the copy is not disturbed by any change of the model.
        """
        async with self._gate.shared():
            chosen = choose(self._registry, terms, unload_others)
            model, rows = await self._container.perform(
                lambda context: (
                    bare_copy(context.model),
                    probe_rows(context.tokenizer, self._info.context_tokens),
                )
            )
        return chosen, model, rows

    async def _work(
        self, chosen: Choice, model: Any, rows: list[list[int]], precision: Precision, tell: Tell
    ) -> _Work:
        """Read, merge and compare; nothing that is served changes."""
        adapters = await self._aside.run(chosen.read_again, model)
        terms = list(zip(adapters, chosen.weights, strict=True))
        tell = on_loop(tell, chosen.name)
        merged = await self._aside.run(
            merge, model, terms, precision, self._threshold, rows, chosen.name, tell
        )
        return _Work(adapters, merged, model)

    async def _write(self, draft: ModelDraft, model: Any, adapter_id: str, tell: Tell) -> None:
        """Write a model folder, and look now and then how much of it there is."""
        tell = on_loop(tell, adapter_id)
        total_bytes, told_bytes = draft.expected_bytes(model), 0
        tell(FuseProgress("writing", 0, total_bytes))
        writing = asyncio.ensure_future(self._aside.run(draft.write, model, self._info))
        while not (await asyncio.wait({writing}, timeout=_LOOK_SECONDS))[0]:
            found_bytes = await asyncio.to_thread(draft.written_bytes)
            # All of it is told when it has its name; the folder that is looked at is there no more then.
            if told_bytes < found_bytes < total_bytes:
                told_bytes = found_bytes
                tell(FuseProgress("writing", told_bytes, total_bytes))
        await writing
        tell(FuseProgress("writing", total_bytes, total_bytes))

    def _note_fused(self, chosen: Choice, layers: FusedLayers) -> None:
        """Bring the books in line with a base that has these layers, beside which there are no others."""
        self._residency.clear()
        self._fused = _Fused(chosen.entries, layers)
        before = self._registry.versions  # as they are now: loads went on until the gate closed
        for other in self._registry.entries:
            if other not in chosen.entries:
                self._registry.remove(other)
        for entry in chosen.entries:
            entry.retired = []
        self._registry.start_fused(chosen.entries, () if chosen.is_alone else chosen.terms)
        self._unloader.forget_copies(before - self._registry.versions)

    async def _forget_what_left(self) -> None:
        """A fusion that failed may have emptied the bank: what is not there comes back when it is named."""
        present = await self._container.perform(lambda context: context.bank.residents)
        for version in self._residency.versions:
            if version.resident not in present:
                self._residency.drop(version)


def _result(
    event: str, chosen: Choice, merged: Merged, started: float, saved_to: str | None = None
) -> FuseResult:
    """What the caller gets, and the log."""
    report, activations = merged.report, merged.activations
    seconds = time.perf_counter() - started
    _log.info(
        event,
        adapter=chosen.name,
        terms=list(chosen.terms),
        saved_to=saved_to,
        precision=report.precision,
        error=report.error_mean,
        agreement=activations.agreement,
        kl=activations.kl_mean,
        seconds=round(seconds, 3),
    )
    return FuseResult(chosen.name, chosen.terms, report, activations, seconds, saved_to)

"""The adapters' life cycle: resolve, load, replace, roll back, unload, swap, fuse, unfuse.

A call that changes adapters runs to its end even if its caller leaves meanwhile, so that names and bank
never disagree; calls on one id take turns, calls on different ids do not wait for each other. Loads and
unloads pass the gate together, surgery on the base passes it alone. What is registered comes into memory and
leaves it by the `pager`. Knows no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import mlx.nn as nn
import structlog

from adapters_core.container import AdapterContainer
from adapters_core.fusing.fusion import AUTO_THRESHOLD
from server.engine.container import ModelContainer
from server.engine.model import ModelInfo

from .errors import AdapterBusyError, AdapterExistsError, BaseIsFusedError, LifeCycleError, quoted
from .folder import AdapterFolder, AdapterFolders, check_id
from .fusing import FuseOptions, Fuser, FuseResult, Precision, Tell, no_tell
from .gate import Gate
from .keeping import Keeper, PrivateFolder
from .looks import unchanged_seconds
from .names import checkpoint_of, parse_name
from .pager import Accept, Pager
from .registry import Entry, Pin, Registry, Terms, Version
from .reports import log_warnings
from .residency import Residency
from .saving import bare_copy
from .source import Made
from .watching import Watcher

__all__ = ["AdapterService", "Listing", "Loaded", "ServiceOptions", "Swapped"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`memory_bytes` bounds what adapters in memory take; `models_dir` is where models are saved, and
    `fuse_threshold` the relative error of a layer's change up to which fusing takes a smaller form.

    `wait_seconds` bounds how long a request waits for others to make room for the adapters that it names,
    `max_waiting` how many wait for that, and how many for loads. Copies of versions that could not be read
    again lie in a folder under `kept_dir` (None: the system's for temporary files), `kept_bytes` at most.
    `watched_dir`, the adapters root if it is watched, is read where it was the same for `settle_seconds`,
    and looked at every `rescan_seconds` whatever the system tells.
    """

    memory_bytes: int
    wait_seconds: float = 30.0
    max_waiting: int = 256
    load_on_demand: bool = True
    unload_timeout_seconds: float = 30.0
    models_dir: Path | None = None
    fuse_threshold: float = AUTO_THRESHOLD
    kept_dir: Path | None = None
    kept_bytes: int = 1 << 32
    watched_dir: Path | None = None
    settle_seconds: float = 1.0
    rescan_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """`entry` has a new version; `created` says whether its id is new as well."""

    entry: Entry
    created: bool


@dataclass(frozen=True, slots=True)
class Swapped:
    """What "default" means now and meant before."""

    active: str | None
    previous: str | None
    swap_seconds: float


@dataclass(frozen=True, slots=True)
class Listing:
    """`resident_bytes` is what the bank takes; `available` are ids that could be loaded.

    `checkpoints` are the steps that trainings have written, by the id that their folder under the root gives.
    """

    entries: list[Entry]
    resident_bytes: int
    available: list[str]
    checkpoints: dict[str, list[int]]


class AdapterService:
    """The adapters beside the one model in `container`, which is served under the name `base`.

    `on_load` is told how many seconds each load took.
    """

    def __init__(
        self,
        container: ModelContainer,
        info: ModelInfo,
        base: str,
        folders: AdapterFolders,
        options: ServiceOptions,
        on_load: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.registry = Registry(base, self._on_release)
        self.residency = Residency(options.memory_bytes)
        self.info = info
        self.created = time.time()
        self._container = container
        self._folders = folders
        self._options = options
        self._gate = Gate()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._released = asyncio.Event()
        self._closing = False
        self._on_load = on_load
        self._private = PrivateFolder(options.kept_dir)
        self.keeper = Keeper(container, self.registry, self._private, options.kept_bytes)
        self._pager = Pager(
            container, folders, self.registry, self.residency, self.keeper, self._gate, options.wait_seconds,
            options.max_waiting, start=self._start_load, on_load=on_load, is_settled=self._is_settled,
            on_change=lambda adapter_id, version: log_warnings(adapter_id, version, self.registry, info),
        )  # fmt: skip
        self._watcher: Watcher | None = None
        if options.watched_dir is not None:
            self._watcher = Watcher(
                options.watched_dir,
                folders,
                self.registry,
                self._load_watched,
                options.settle_seconds,
                options.rescan_seconds,
            )
        self._watching: asyncio.Task[None] | None = None
        self._fuser = Fuser(
            container, info, self.registry, self.residency, self._gate, self._idle,
            FuseOptions(options.models_dir, options.fuse_threshold),
        )  # fmt: skip

    async def start(self, adapter_ids: Iterable[str]) -> None:
        """Load the adapters that the operator named, and begin to watch the root if that is wished.

        Adapters that do not fit together leave memory again.

        Raises: what `load` raises.
        """
        for adapter_id in adapter_ids:
            await self.load(adapter_id)
        if self._watcher is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watcher.run())

    async def close(self) -> None:
        """End the changes that are under way, without waiting for requests; call it when no more come."""
        self._closing = True
        self._released.set()
        self._pager.close()
        if self._watcher is not None and self._watching is not None:
            self._watcher.close()
            await self._watching
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await asyncio.to_thread(self._private.close)

    async def resolve(self, model: str | None, adapters: Terms | None = None) -> Pin:
        """What a request that names `model` and `adapters` computes with, in memory; loads on demand.

        The caller releases the pin when the request has ended in any way.

        Raises:
            UnknownModelError, UnknownVersionError, AdaptersWithModelError, BaseIsFusedError, BlendError: as
                `Registry.resolve`.
            AdapterMemoryError, AdapterMemoryBusyError: there is no room, now or ever.
            AdapterNotFoundError, PathNotAllowedError, InvalidAdapterError: an adapter that was to be loaded.
        """
        await self._load_what_is_named(model, adapters)
        (pin,) = await self._pager.pin([(model, adapters)])
        return pin

    async def resolve_together(self, models: Sequence[str]) -> list[Pin]:
        """What each of `models` computes with, all as of one instant, in their order.

        Raises: as `resolve`; then none is kept.
        """
        for model in models:
            await self._load_what_is_named(model, None)
        return await self._pager.pin([(model, None) for model in models])

    async def list(self) -> Listing:
        """All adapters, loaded and not."""
        loaded = {entry.id for entry in self.registry.entries}
        available = await asyncio.to_thread(self._folders.available, self.registry.base, loaded)
        resident_bytes = await self._container.perform(lambda context: context.bank.resident_bytes)
        entries = self.registry.entries
        gone = {entry.id for entry in entries}
        await self.look_for_checkpoints(*entries)
        checkpoints = await asyncio.to_thread(self._folders.trainings, self.registry.base)
        available = [name for name in available if name not in gone]
        return Listing(entries, resident_bytes, available, checkpoints)

    async def look_for_checkpoints(self, *entries: Entry) -> None:
        """See which checkpoints lie in the folders of `entries` now."""
        sources = [(entry, entry.current.source) for entry in entries]

        def look() -> None:
            for entry, source in sources:
                if isinstance(source, AdapterFolder) and source.weights_file is None:
                    entry.checkpoints = self._folders.steps(source)
                else:
                    entry.checkpoints = ()

        await asyncio.to_thread(look)

    async def load(
        self,
        adapter_id: str,
        path: str | None = None,
        *,
        pinned: bool | None = None,
        activate: bool = False,
        replace: bool = False,
    ) -> Loaded:
        """Load an adapter, or with `replace` a new version of it; on failure everything is as before.

        Raises:
            InvalidAdapterIdError, PathNotAllowedError, AdapterNotFoundError, AdapterExistsError,
            InvalidAdapterError, AdapterMemoryError, BaseIsFusedError
        """
        check_id(adapter_id, self.registry.base)
        loaded = await self._to_the_end(self._load(adapter_id, path, pinned, activate, replace))
        await self._to_the_end(self._reap())
        return loaded

    async def load_made(
        self,
        adapter_id: str,
        made: Made,
        make: Callable[[], AdapterContainer],
        *,
        pinned: bool | None = None,
        activate: bool = False,
        replace: bool = False,
    ) -> Loaded:
        """Load what `make` makes from other adapters, on a thread of its own; otherwise as `load`.

        Raises:
            InvalidAdapterIdError, AdapterExistsError, InvalidAdapterError, AdapterMemoryError,
            BaseIsFusedError, VersionNotKeptError, and what `make` raises.
        """
        check_id(adapter_id, self.registry.base)

        async def work() -> Loaded:
            async with self._lock(adapter_id):
                entry = self._replaceable(adapter_id, replace)
                published = await self._pager.place_made(
                    adapter_id,
                    made,
                    make,
                    entry,
                    lambda: self._refuse_load_if_fused(adapter_id),
                    lambda version: self._publish(adapter_id, version, pinned, activate),
                )
                return Loaded(published, created=entry is None)

        loaded = await self._to_the_end(work())
        await self._to_the_end(self._reap())
        return loaded

    async def roll_back(self, adapter_id: str) -> Entry:
        """Make the previous version of an adapter the current one; requests in flight finish on theirs.

        The version that was current is what the next rollback leads to.

        Raises:
            AdapterNotFoundError: it is not loaded.
            NoPreviousVersionError, VersionGoneError: there is nothing to go back to.
            AdapterMemoryError: there is no room for it.
            BaseIsFusedError: it, or another, is fused.
        """
        entry = await self._to_the_end(self._roll_back(adapter_id))
        await self._to_the_end(self._reap())
        return entry

    async def unload(self, adapter_id: str, timeout_seconds: float | None = None) -> tuple[Entry, int]:
        """Serve an adapter to no new request, wait for those in flight, take it out of the bank.

        Returns the entry as it was at the end and the bytes that were freed.

        Raises:
            AdapterNotFoundError: it is not loaded.
            AdapterBusyError: requests still use it when the time is up; it is served again.
            BaseIsFusedError: it, or another, is fused.
        """
        if timeout_seconds is None:
            timeout_seconds = self._options.unload_timeout_seconds
        return await self._to_the_end(self._unload(adapter_id, timeout_seconds))

    async def swap(self, adapter_id: str | None, unload_previous: bool = False) -> Swapped:
        """Change at one instant what "default" means; an adapter that is not loaded is loaded first.

        With `unload_previous`, an idle previous one is gone when this returns; a busy one is served to no new
        request and goes when those in flight have ended, if that is soon enough for an unload.

        Raises: as `load`, except that the adapter may be loaded already.
        """
        started = time.perf_counter()
        if unload_previous and self.registry.active not in (None, adapter_id):
            self._refuse_if_fused("none can be unloaded")
        if adapter_id is not None and self.registry.find(adapter_id) is None:
            with suppress(AdapterExistsError):  # another call was faster
                await self.load(adapter_id)
        previous = self.registry.activate(adapter_id)
        if unload_previous and previous not in (None, adapter_id):
            await self._unload_if_idle(previous)
        return Swapped(adapter_id, previous, time.perf_counter() - started)

    async def fuse(
        self, what: str | Terms, precision: Precision, unload_others: bool = False, tell: Tell = no_tell
    ) -> FuseResult:
        """Fuse an adapter, or a sum of (id, weight) terms, into the resident base. As `Fuser.fuse`."""
        terms = [(what, 1.0)] if isinstance(what, str) else what
        timeout_seconds = self._options.unload_timeout_seconds
        work = self._fuser.fuse(terms, precision, unload_others, timeout_seconds, tell)
        return await self._to_the_end(self._in_turn(terms[0][0], work))

    async def save_fused(
        self, what: str | Terms, precision: Precision, name: str, tell: Tell = no_tell
    ) -> FuseResult:
        """Write the base with such terms fused into it to a new model folder. As `Fuser.save`."""
        terms = [(what, 1.0)] if isinstance(what, str) else what
        work = self._fuser.save(terms, precision, name, tell)
        return await self._to_the_end(self._in_turn(terms[0][0], work))

    async def unfuse(self, adapter_id: str) -> Entry:
        """Put the base back as it was. As `Fuser.unfuse`."""
        timeout_seconds = self._options.unload_timeout_seconds
        work = self._fuser.unfuse(adapter_id, timeout_seconds)
        return await self._to_the_end(self._in_turn(adapter_id, work))

    async def bare_model(self, refused: str) -> nn.Module:
        """A copy of the base's module tree that shares its arrays, without adapters; it stays as it is now.

        Raises: BaseIsFusedError, which says what is `refused`.
        """
        async with self._gate.shared():
            self._refuse_if_fused(refused)
            return await self._container.perform(lambda context: bare_copy(context.model))

    async def _load(
        self, adapter_id: str, path: str | None, pinned: bool | None, activate: bool, replace: bool
    ) -> Loaded:
        async with self._lock(adapter_id):
            entry = self._replaceable(adapter_id, replace)
            folder = await asyncio.to_thread(self._folders.find, adapter_id, path)
            published = await self._pager.fetch_in_turn(
                folder,
                entry,
                lambda: self._refuse_load_if_fused(adapter_id),
                lambda version: self._publish(adapter_id, version, pinned, activate),
            )
            return Loaded(published, created=entry is None)

    def _replaceable(self, adapter_id: str, replace: bool) -> Entry | None:
        """What is to be replaced, if there is anything."""
        self._refuse_load_if_fused(adapter_id)
        entry = self.registry.find(adapter_id)
        if entry is not None and not replace:
            raise AdapterExistsError(adapter_id)
        return entry

    def _publish(
        self, adapter_id: str, version: Version, pinned: bool | None = None, activate: bool = False
    ) -> Entry:
        self._on_load(version.load_seconds)
        digest = version.resident.digest
        _log.info("adapter_loaded", adapter=adapter_id, version=version.number, digest=digest)
        log_warnings(adapter_id, version, self.registry, self.info)
        entry = self.registry.publish(adapter_id, version, pinned)
        if activate:
            self.registry.activate(adapter_id)
        return entry

    async def _roll_back(self, adapter_id: str) -> Entry:
        async with self._lock(adapter_id):
            entry = self.registry.get(adapter_id)
            await self._pager.roll_back(
                entry, lambda: self._refuse_if_fused(f"{quoted(adapter_id)} cannot be rolled back")
            )
            _log.info("adapter_rolled_back", adapter=adapter_id, version=entry.current.number)
            return entry

    async def _load_what_is_named(self, model: str | None, adapters: Terms | None) -> None:
        for text, _ in self.registry.terms(model, adapters):
            name = parse_name(text, self.registry.base)
            # What is not registered has no versions that could be asked for.
            if name is not None and name.version is None and self.registry.find(name.entry) is None:
                await self._load_on_demand(name.entry)

    async def _load_on_demand(self, adapter_id: str) -> None:
        """Load the adapter if it may be; those who want it at the same time wait for one load."""
        if not self._options.load_on_demand or self._was_unloaded(adapter_id):
            return
        with self._pager.waiting_for_load():
            task = self._loading.get(adapter_id)
            if task is None:
                task = self._loading[adapter_id] = self._task(self._demand(adapter_id))
                task.add_done_callback(lambda _: self._loading.pop(adapter_id, None))
            await asyncio.shield(task)

    async def _demand(self, adapter_id: str) -> None:
        folder = await asyncio.to_thread(self._folder_on_demand, adapter_id)
        if folder is None or not await asyncio.to_thread(self._is_settled, folder):
            return
        async with self._lock(adapter_id), self._gate.shared():
            self._refuse_load_if_fused(adapter_id)
            if self.registry.find(adapter_id) is None and not self._was_unloaded(adapter_id):
                # Without room at once it is registered, and the requests that name it wait for room.
                await self._pager.fetch(folder, lambda version: self._publish(adapter_id, version))

    async def _load_watched(self, adapter_id: str, folder: AdapterFolder, accept: Accept) -> None:
        """Load what is in a watched folder, unless the id was unloaded by a call."""
        await self._to_the_end(self._load_found(adapter_id, folder, accept))
        await self._to_the_end(self._reap())

    async def _load_found(self, adapter_id: str, folder: AdapterFolder, accept: Accept) -> None:
        def publish(version: Version) -> Entry:
            entry = self.registry.find(adapter_id)
            if entry is not None and entry.newest.resident.digest == version.resident.digest:
                self.registry.retire(entry, version)  # a request was faster, which found the same
                return entry
            return self._publish(adapter_id, version)

        async with self._lock(adapter_id):
            entry = self.registry.find(adapter_id)
            if entry is not None and entry.current.in_memory:
                check = partial(self._refuse_load_if_fused, adapter_id)
                await self._pager.fetch_in_turn(folder, entry, check, publish, accept)
                return
            async with self._gate.shared():
                self._refuse_load_if_fused(adapter_id)
                if adapter_id not in self.registry.unloaded:
                    # Nobody waits for it, so nothing leaves memory for it.
                    await self._pager.fetch(folder, publish, entry, accept, may_evict=False)

    def _folder_on_demand(self, adapter_id: str) -> AdapterFolder | None:
        checkpoint = checkpoint_of(adapter_id)
        if checkpoint is None:
            return self._folders.on_demand(adapter_id)
        trained = self.registry.find(checkpoint.id)
        source = None if trained is None else trained.newest.source
        parent = source if isinstance(source, AdapterFolder) else None
        return self._folders.checkpoint(checkpoint.id, checkpoint.step, parent)

    def _is_settled(self, folder: AdapterFolder) -> bool:
        """Whether a request may read `folder`: in a watched root, nothing that is being written is read."""
        return self._watcher is None or unchanged_seconds(folder) >= self._options.settle_seconds

    def _was_unloaded(self, adapter_id: str) -> bool:
        """By a call, itself or the adapter that it is a checkpoint of."""
        checkpoint = checkpoint_of(adapter_id)
        trained = None if checkpoint is None else checkpoint.id
        return not self.registry.unloaded.isdisjoint({adapter_id, trained})

    async def _unload(self, adapter_id: str, timeout_seconds: float) -> tuple[Entry, int]:
        async with self._lock(adapter_id):
            async with self._gate.shared():
                entry = self.registry.get(adapter_id)
                self._refuse_if_fused("none can be unloaded")
                was_active = self.registry.start_draining(entry)
                self._pager.look_again()  # who waits for it is told at once that it is not served
            try:
                await self._idle(lambda: entry.uses, timeout_seconds, f"adapter {quoted(adapter_id)}")
                await self._gate.opened()
            except BaseException:
                self.registry.stop_draining(entry, was_active)
                raise
            async with self._gate.shared():
                self.registry.remove(entry)
                freed_bytes = await self._pager.remove(entry.versions)
            _log.info("adapter_unloaded", adapter=adapter_id, freed_bytes=freed_bytes)
            return entry, freed_bytes

    async def _unload_if_idle(self, adapter_id: str) -> None:
        entry = self.registry.find(adapter_id)
        if entry is None:
            return
        idle = not entry.uses
        task = self._task(self._unload(adapter_id, self._options.unload_timeout_seconds))
        task.add_done_callback(lambda done: _log_failure("previous_adapter_not_unloaded", adapter_id, done))
        if idle:
            await asyncio.wait({task})

    async def _reap(self) -> None:
        """Take the versions out of the bank that were replaced and that no request uses any more."""
        async with self._gate.shared():
            stale = self.registry.take_stale()
            if stale:
                await self._pager.remove(stale)

    async def _idle(self, in_flight: Callable[[], int], timeout_seconds: float, what: str) -> None:
        """Wait until `in_flight()` is 0. Raises AdapterBusyError when the time is up."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while in_flight() and not self._closing:
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            pass
        if in_flight():
            raise AdapterBusyError(
                f"After {timeout_seconds:g} s, {in_flight()} request(s) in flight still use {what}; "
                "everything is as before. Try again, or allow more time.",
                in_flight(),
            )

    def _on_release(self, versions: Sequence[Version]) -> None:
        for version in versions:
            self.residency.touch(version)
        self._released.set()
        self._pager.look_again()
        if self.registry.has_stale:
            self._task(self._reap())

    def _refuse_load_if_fused(self, adapter_id: str) -> None:
        self._refuse_if_fused(f"{quoted(adapter_id)} cannot be loaded")

    def _refuse_if_fused(self, refused: str) -> None:
        if self.registry.fused is not None:
            raise BaseIsFusedError(self.registry.fused, refused)

    async def _in_turn(self, adapter_id: str, work: Coroutine[Any, Any, _T]) -> _T:
        before = self.registry.versions
        try:
            async with self._lock(adapter_id):
                return await work
        finally:
            self._pager.forget_copies(before - self.registry.versions)
            self._pager.look_again()

    def _lock(self, adapter_id: str) -> asyncio.Lock:
        return self._locks.setdefault(adapter_id, asyncio.Lock())

    async def _to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of `work`, which goes on if the caller is cancelled."""
        return await asyncio.shield(self._task(work))

    def _start_load(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._task(work)
        task.add_done_callback(lambda _: self._on_release(()))
        return task

    def _task(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LifeCycleError):
            _log.debug("adapter_call_failed", error=repr(error))


def _log_failure(event: str, adapter_id: str, task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.warning(event, adapter=adapter_id, reason=str(error))

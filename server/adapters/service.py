"""The adapters' life cycle: resolve, load, replace, roll back, unload, swap, fuse, unfuse.

A call that changes adapters runs to its end even if its caller leaves meanwhile, so that names and bank
never disagree; calls on one id take turns, calls on different ids do not wait for each other. Loads and
unloads pass the gate together, surgery on the base passes it alone. This is the face of the parts that do the
work, and puts them together. Knows no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.nn as nn

from adapters_core.errors import AdapterError
from adapters_core.fusing.fusion import Precision
from adapters_core.layers.module_weights import ModuleWeights
from server.engine.container import ModelContainer
from server.engine.model import ModelInfo

from .aside import Aside
from .bare import bare_copy
from .changes import Changes, Loaded, Wishes
from .errors import AdapterExistsError, LifeCycleError
from .finding import Finder
from .folder import AdapterFolder, AdapterFolders, check_id
from .fusing.fuser import FuseOptions, Fuser, FuseResult
from .fusing.progress import Tell, no_tell
from .gate import Gate
from .keeping.keeper import Keeper
from .keeping.private import PrivateFolder
from .listing import Lister, Listing
from .memory.line import Line
from .memory.memory import Memory
from .memory.residency import Residency
from .names import parse_name
from .options import ServiceOptions
from .paging.pace import ReadingPace
from .paging.pinning import Pinner
from .paging.placing import Accept, Placer
from .paging.reading import Reader
from .paging.reloading import Reloader
from .paging.returning import Returner
from .pins import Pin, Resolved, Terms
from .registry import Registry
from .releases import Releases
from .reports import Journal
from .source import Made
from .tasks import Tasks
from .unloading import Unloader
from .versions import Entry
from .watching import Watcher

__all__ = ["AdapterService", "Listing", "Loaded", "ServiceOptions", "Swapped"]

_T = TypeVar("_T")

_WORKING_THREADS = 4
_COPYING_THREADS = 2


@dataclass(frozen=True, slots=True)
class Swapped:
    """What "default" means now and meant before."""

    active: str | None
    previous: str | None
    swap_seconds: float


class AdapterService:
    """The adapters beside the one model in `container`, which is served under the name `base`.

    `on_load` is told how many seconds each load took. `is_held_up` says whether what a load computes beside
    the generation takes from running requests.
    """

    def __init__(
        self,
        container: ModelContainer,
        info: ModelInfo,
        base: str,
        folders: AdapterFolders,
        options: ServiceOptions,
        on_load: Callable[[float], None] = lambda seconds: None,
        is_held_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.registry = Registry(base, lambda versions: self._unloader.released(versions))
        self.residency = Residency(options.memory_bytes)
        self.info = info
        self.created = time.time()
        self.aside = Aside("adapter-work", _WORKING_THREADS)
        """Where what may take long is computed: blends, fusions, what is saved."""
        self._reading = Aside("adapter-reading", 1)  # for one is read at a time
        self._copying = Aside("adapter-copying", _COPYING_THREADS)
        self._container = container
        self._options = options
        self._gate = gate = Gate()
        self._tasks = tasks = Tasks(container.while_alive)
        self._releases = Releases()
        self._line = Line(gate, options.max_waiting, options.wait_seconds)
        self._private = PrivateFolder(options.kept_dir)
        self._memory = memory = Memory(container, gate, self.residency, self._line)
        self.keeper = keeper = Keeper(
            self._copying, memory, self.registry, self._private, tasks, options.kept_bytes
        )
        self._unloader = unloader = Unloader(self.registry, memory, keeper, tasks, self._releases)
        journal = Journal(self.registry, info, on_load)
        is_watched = options.watched_dir is not None
        settle_seconds = options.settle_seconds if is_watched else None
        self._folders = folders
        reading_pace = ReadingPace(is_held_up)
        self._reader = reader = Reader(self._reading, memory, folders, keeper, settle_seconds, reading_pace)
        placer = Placer(self.registry, memory, keeper, reader)
        reloader = Reloader(self.registry, memory, placer, unloader, journal)
        returner = Returner(self.registry, memory, keeper, reader, reloader)
        self._lister = Lister(self.registry, memory, folders)
        self._pinner = Pinner(self.registry, memory, reloader)
        self._changes = Changes(self.registry, folders, tasks, placer, returner, journal)
        self._finder = Finder(self.registry, folders, tasks, gate, placer, journal)
        self._fuser = Fuser(
            self.aside, container, info, self.registry, self.residency, gate, unloader,
            FuseOptions(options.models_dir, options.fuse_threshold),
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

    async def start(self, adapter_ids: Iterable[str]) -> None:
        """Load the adapters that the operator named, and begin to watch the root if that is wished.

        Adapters that do not fit together leave memory again.

        Raises: what `load` raises; RuntimeError, OSError: the system has no threads to give.
        """
        for aside in (self.aside, self._reading, self._copying):
            aside.start()
        await self._memory.bank()  # so that lists need not wait for the thread
        for adapter_id in adapter_ids:
            await self.load(adapter_id)
        if self._watcher is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watcher.run())

    async def close(self) -> None:
        """End the changes that are under way, without waiting for requests; call it when no more come."""
        self._releases.close()
        self._line.close()
        if self._watcher is not None and self._watching is not None:
            self._watcher.close()
            await self._watching
        await self._tasks.ended()
        for aside in (self.aside, self._reading, self._copying):
            await asyncio.to_thread(aside.close)
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
        async with self._container.while_alive():
            await self._load_what_is_named(model, adapters)
            (pin,) = await self._pinner.pin([(model, adapters)])
        return pin

    async def resolve_together(self, models: Sequence[str]) -> list[Pin]:
        """What each of `models` computes with, all as of one instant, in their order.

        Raises: as `resolve`; then none is kept.
        """
        async with self._container.while_alive():
            for model in models:
                await self._load_what_is_named(model, None)
            return await self._pinner.pin([(model, None) for model in models])

    async def look_up(self, model: str) -> Resolved | str:
        """What a request that names `model` would be answered with, or the id that it would load first.

        Raises: as `resolve`, but for what a load finds.
        """
        for adapter_id in self._to_be_loaded(model, None):
            if await self._finder.could_load(adapter_id):
                return adapter_id
            await self._finder.refuse_if_training(adapter_id, "model")
        return self.registry.resolve(model)

    async def on_demand(self) -> Sequence[str]:
        """The ids of folders under the root that requests may name although nothing loaded them yet."""
        if not self._options.load_on_demand or self.registry.fused is not None:
            return ()
        return [name for name in await self._lister.available() if self._may_be_demanded(name)]

    async def list(self) -> Listing:
        """All adapters, loaded and not."""
        return await self._lister.list()

    async def look_for_checkpoints(self, *entries: Entry) -> None:
        """See which checkpoints lie in the folders of `entries` now."""
        await self._lister.look_for_checkpoints(entries)

    async def load(
        self,
        adapter_id: str,
        path: str | None = None,
        *,
        scale: float | None = None,
        pinned: bool | None = None,
        activate: bool = False,
        replace: bool = False,
    ) -> Loaded:
        """Load an adapter, or with `replace` a new version of it; on failure everything is as before.

        `scale` stands in place of the one in a config in mlx-lm's format.

        Raises:
            InvalidAdapterIdError, PathNotAllowedError, AdapterNotFoundError, AdapterExistsError,
            InvalidAdapterError, AdapterMemoryError, BaseIsFusedError
        """
        check_id(adapter_id, self.registry.base)
        wishes = Wishes(pinned, activate, replace)
        return await self._change(self._changes.load(adapter_id, path, wishes, scale))

    async def load_made(
        self,
        adapter_id: str,
        made: Made,
        weights: Mapping[str, ModuleWeights],
        *,
        pinned: bool | None = None,
        activate: bool = False,
        replace: bool = False,
    ) -> Loaded:
        """Load `weights`, evaluated, by module, which were made of other adapters; otherwise as `load`.

        Raises:
            InvalidAdapterIdError, AdapterExistsError, InvalidAdapterError, AdapterMemoryError,
            BaseIsFusedError, VersionNotKeptError
        """
        check_id(adapter_id, self.registry.base)
        wishes = Wishes(pinned, activate, replace)
        return await self._change(self._changes.load_made(adapter_id, made, weights, wishes))

    async def roll_back(self, adapter_id: str) -> Entry:
        """Make the previous version of an adapter the current one; requests in flight finish on theirs.

        The version that was current is what the next rollback leads to.

        Raises:
            AdapterNotFoundError: it is not loaded.
            NoPreviousVersionError, VersionGoneError: there is nothing to go back to.
            AdapterMemoryError: there is no room for it.
            BaseIsFusedError: it, or another, is fused.
        """
        return await self._change(self._changes.roll_back(adapter_id))

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
        return await self._tasks.to_the_end(self._unloader.unload(adapter_id, timeout_seconds))

    async def swap(self, adapter_id: str | None, unload_previous: bool = False) -> Swapped:
        """Change at one instant what "default" means; an adapter that is not loaded is loaded first.

        With `unload_previous`, an idle previous one is gone when this returns; a busy one is served to no new
        request and goes when those in flight have ended, if that is soon enough for an unload.

        Raises: as `load`, except that the adapter may be loaded already.
        """
        started = time.perf_counter()
        if unload_previous and self.registry.active not in (None, adapter_id):
            self.registry.refuse_if_fused("none can be unloaded")
        if adapter_id is not None and self.registry.find(adapter_id) is None:
            with suppress(AdapterExistsError):  # another call was faster
                await self.load(adapter_id)
        previous = self.registry.activate(adapter_id)
        if unload_previous and previous not in (None, adapter_id):
            await self._unloader.unload_if_idle(previous, self._options.unload_timeout_seconds)
        return Swapped(adapter_id, previous, time.perf_counter() - started)

    async def fuse(
        self, what: str | Terms, precision: Precision, unload_others: bool = False, tell: Tell = no_tell
    ) -> FuseResult:
        """Fuse an adapter, or a sum of (id, weight) terms, into the resident base. As `Fuser.fuse`.

        What is not registered is loaded on demand first.
        """
        terms = [(what, 1.0)] if isinstance(what, str) else what
        await self._load_to_fuse(terms)
        timeout_seconds = self._options.unload_timeout_seconds
        work = self._fuser.fuse(terms, precision, unload_others, timeout_seconds, tell)
        return await self._tasks.to_the_end(self._in_turn(terms[0][0], work))

    async def save_fused(
        self, what: str | Terms, precision: Precision, name: str, tell: Tell = no_tell
    ) -> FuseResult:
        """Write the base with such terms fused into it to a new model folder. As `Fuser.save`."""
        terms = [(what, 1.0)] if isinstance(what, str) else what
        await self._load_to_fuse(terms)
        work = self._fuser.save(terms, precision, name, tell)
        return await self._tasks.to_the_end(self._in_turn(terms[0][0], work))

    async def unfuse(self, adapter_id: str) -> Entry:
        """Put the base back as it was. As `Fuser.unfuse`."""
        timeout_seconds = self._options.unload_timeout_seconds
        work = self._fuser.unfuse(adapter_id, timeout_seconds)
        return await self._tasks.to_the_end(self._in_turn(adapter_id, work))

    async def to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of `work`, which goes on if the caller is cancelled; `close` waits for it."""
        return await self._tasks.to_the_end(work)

    async def note_saved(self, name: str) -> None:
        """The folder `name` under the root is whole, so that a request may name it at once."""
        with suppress(AdapterError, LifeCycleError):  # it has gone again
            await self._reader.note_whole(await asyncio.to_thread(self._folders.find, name, name))

    async def bare_model(self, refused: str) -> nn.Module:
        """A copy of the base's module tree that shares its arrays, without adapters; it stays as it is now.

        Raises: BaseIsFusedError, which says what is `refused`.
        """
        async with self._gate.shared():
            self.registry.refuse_if_fused(refused)
            return await self._container.perform(lambda context: bare_copy(context.model))

    async def _load_what_is_named(self, model: str | None, adapters: Terms | None) -> None:
        for adapter_id in self._to_be_loaded(model, adapters):
            with self._pinner.waiting_for_load():
                await self._finder.demand(adapter_id)
            if self.registry.find(adapter_id) is None:
                await self._finder.refuse_if_training(adapter_id, "model" if adapters is None else "adapters")

    def _to_be_loaded(self, model: str | None, adapters: Terms | None) -> Iterator[str]:
        """The ids that a request names, are not registered, and may be loaded for it."""
        for text, _ in self.registry.terms(model, adapters):
            name = parse_name(text, self.registry.base)
            # What is not registered has no versions that could be asked for.
            if name is not None and name.version is None and self._may_be_demanded(name.entry):
                yield name.entry

    async def _load_to_fuse(self, terms: Terms) -> None:
        for adapter_id, _ in terms:
            if parse_name(adapter_id, self.registry.base) is not None and self._may_be_demanded(adapter_id):
                await self._finder.demand(adapter_id)

    def _may_be_demanded(self, adapter_id: str) -> bool:
        is_new = self.registry.find(adapter_id) is None and not self.registry.was_unloaded(adapter_id)
        return is_new and self._options.load_on_demand

    async def _load_watched(self, adapter_id: str, folder: AdapterFolder, accept: Accept) -> None:
        await self._change(self._finder.load(adapter_id, folder, accept))

    async def _change(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of `work`, which may leave versions behind that nothing uses, whoever waits for it."""

        async def work_and_reap() -> _T:
            try:
                done = await work
            except BaseException:
                self._unloader.released()  # waits for nothing: why it failed is told at once
                raise
            await self._unloader.reap()
            return done

        return await self._tasks.to_the_end(work_and_reap())

    async def _in_turn(self, adapter_id: str, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of surgery on the base; who waits for what is served no more is told."""
        try:
            async with self._tasks.lock(adapter_id):
                return await work
        finally:
            self._line.look_again()

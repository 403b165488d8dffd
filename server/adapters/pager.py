"""Brings versions into memory: for requests that name them, and for calls that load something new.

A load reads, checks and lays out beside the generation, a few at a time, and then changes the bank in one
update that first removes what has to leave. While it does so it is inside the gate; while it waits for room
it is not, so that surgery on the base waits for no request. What is about to be replaced is copied aside by
the `keeper` first. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import structlog

from adapters_core.bank import AdapterBank, PreparedAdapter
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from server.engine.container import ModelContainer

from .errors import (
    AdapterChangingError,
    AdapterMemoryBusyError,
    AdapterMemoryError,
    LifeCycleError,
    NoPreviousVersionError,
    VersionGoneError,
    VersionNotKeptError,
)
from .folder import AdapterFolder, AdapterFolders
from .gate import Gate
from .keeping import Keeper
from .line import Attempt, Line
from .loading import (
    exchange,
    known_as,
    prepare_again,
    prepare_folder,
    prepare_made,
    remove_residents,
)
from .registry import Entry, Pin, Registry, Terms, Version
from .residency import Reservation, Residency
from .source import Made, Source

__all__ = ["MAX_LOADS", "Accept", "Pager"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

MAX_LOADS = 2
"""Loads that read and lay out at one time: one computes while another waits for the disk. What they hold
lies outside the budget, so more would take more memory, and on few cores would not be sooner."""

Accept = Callable[[PreparedAdapter], Awaitable[None]]
"""Raises if what was read is not to be loaded after all."""

Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
_Taken = tuple[list[Pin], tuple[Version, ...], list["asyncio.Task[None]"]]


class Pager:
    """The loads of one service. `start` runs a load to its end; `on_load` is told each one's seconds.

    `is_settled` says whether what a folder holds may become a version without a call; it reads files.
    `on_change` is told of such versions, with their ids.
    At most `max_waiting` requests wait for loads, and as many in line for room.
    """

    def __init__(
        self,
        container: ModelContainer,
        folders: AdapterFolders,
        registry: Registry,
        residency: Residency,
        keeper: Keeper,
        gate: Gate,
        wait_seconds: float,
        max_waiting: int,
        start: Start,
        on_load: Callable[[float], None],
        is_settled: Callable[[AdapterFolder], bool],
        on_change: Callable[[str, Version], None],
    ) -> None:
        self._container = container
        self._folders = folders
        self._registry = registry
        self._residency = residency
        self._keeper = keeper
        self._gate = gate
        self._line = Line(gate, max_waiting)
        self._max_waiting = max_waiting
        self._awaiting_loads = 0
        self._wait_seconds = wait_seconds
        self._start = start
        self._on_load = on_load
        self._is_settled = is_settled
        self._on_change = on_change
        self._readers = asyncio.Semaphore(MAX_LOADS)
        self._loads: dict[Version, asyncio.Task[None]] = {}
        self._bank: AdapterBank | None = None

    def look_again(self) -> None:
        """Pins, versions or the base have changed: whoever waits for room may find it now."""
        self._line.look_again()

    def close(self) -> None:
        """Nobody waits for room any more; call it when no requests come."""
        self._line.close()

    async def pin(self, names: Sequence[tuple[str | None, Terms | None]]) -> list[Pin]:
        """Keep what a request names, in memory, all as of one instant; who wants the same shares its load.

        `names` are (model, adapters), each of which gets a pin. While it waits for room it keeps none.

        Raises:
            As `Registry.resolve`, at the time when it is the request's turn.
            AdapterMemoryError: it can never fit.
            AdapterMemoryBusyError: there was no room in time, or too many wait already.
            AdapterNotFoundError, PathNotAllowedError, InvalidAdapterError: the folder of an adapter that is
                not in memory has gone or is broken; the adapter stays registered.
        """
        is_counted = False
        while True:
            pins, versions, loads = await self._line.in_turn(
                partial(self._take, names, is_counted), self._wait_seconds
            )
            is_counted = True
            try:
                if loads:
                    with self.waiting_for_load():
                        await asyncio.wait(loads)
                    for load in loads:
                        load.result()
                if all(version.in_memory for version in versions):
                    return pins
            except BaseException:
                _release(pins)
                raise
            _release(pins)  # a folder held something new, which is the adapter's next version now

    @contextmanager
    def waiting_for_load(self) -> Iterator[None]:
        """While a request waits for a load. Raises AdapterMemoryBusyError if too many do already."""
        if self._is_crowded:
            raise AdapterMemoryBusyError.crowded(self._awaiting_loads)
        self._awaiting_loads += 1
        try:
            yield
        finally:
            self._awaiting_loads -= 1
            self.look_again()

    async def fetch(
        self,
        folder: AdapterFolder,
        publish: Callable[[Version], Entry],
        entry: Entry | None = None,
        accept: Accept | None = None,
        *,
        may_evict: bool = True,
    ) -> Entry:
        """Load what is in `folder` now, as the next version of `entry`, or the first where there is none.

        Call it inside the gate. If there is no room at once, what is published is not in memory yet; without
        `may_evict`, nothing makes room for it. If this raises, nothing has changed.

        Raises:
            InvalidAdapterError: everything that is wrong with the folder or does not fit the model.
            AdapterMemoryError: it can never fit.
            Whatever `accept` raises.
        """
        with self._keeping_if_it_succeeds(entry):
            return publish(await self._fetch(folder, entry, None, accept, may_evict))

    async def fetch_in_turn(
        self,
        folder: AdapterFolder,
        entry: Entry | None,
        check: Callable[[], None],
        publish: Callable[[Version], Entry],
        accept: Accept | None = None,
    ) -> Entry:
        """As `fetch`, outside the gate: waits for room, and publishes what is in memory only.

        `check` raises if the load is not wanted any more.

        Raises:
            As `fetch` and `check`; AdapterMemoryError also if there was no room in time.
        """
        with self._keeping_if_it_succeeds(entry):
            async with self._gate.shared():
                check()
                version = await self._fetch(folder, entry, None, accept)
                if version.in_memory:
                    return publish(version)
            while True:
                # What was read is let go of: those who wait hold no memory.
                reservation = await self._reserve_in_turn(version.size_bytes, entry, check)
                try:
                    version = await self._fetch(folder, entry, reservation, accept)
                    if version.in_memory:
                        return publish(version)
                finally:
                    self._gate.leave()

    async def place_made(
        self,
        adapter_id: str,
        made: Made,
        make: Callable[[], AdapterContainer],
        entry: Entry | None,
        check: Callable[[], None],
        publish: Callable[[Version], Entry],
    ) -> Entry:
        """As `fetch_in_turn`, for what `make` makes on a thread of its own: a copy of it is kept first.

        Raises:
            As `fetch_in_turn`; VersionNotKeptError: no copy of it could be kept.
        """
        started = time.perf_counter()
        with self._keeping_if_it_succeeds(entry):
            async with self._gate.shared():
                check()
                async with self._readers:
                    bank, limit_bytes = await self._the_bank(), self._residency.limit_bytes
                    prepared = await prepare_made(make, bank, limit_bytes)
                version = Version(0, prepared.resident, made)
                if not await self._keeper.keep(version, prepared):
                    raise VersionNotKeptError(adapter_id)
                del prepared
            try:
                if entry is not None:
                    async with self._gate.shared():
                        await self._keep(entry.current)
                await self._bring_back(version, entry, check)
                version.load_seconds = time.perf_counter() - started
                # Only now: while this waited, a request may have found a next version in the folder.
                version.number = _next_number(entry)
                return publish(version)
            except BaseException:
                await self._forget(version)
                raise

    async def roll_back(self, entry: Entry, check: Callable[[], None]) -> None:
        """Make the previous version of `entry` the current one again, in memory.

        Call it outside the gate. If this raises, nothing has changed.

        Raises:
            NoPreviousVersionError: there is none.
            VersionGoneError: its copy cannot be read.
            AdapterMemoryError: there was no room for it in time.
            Whatever `check` raises.
        """
        check()
        version = entry.previous
        if version is None:
            raise NoPreviousVersionError(entry.id, entry.current.number)

        def still_wanted() -> None:
            check()
            if entry.previous is not version:
                raise NoPreviousVersionError(entry.id, entry.current.number)

        with self._keeping_if_it_succeeds(entry):
            async with self._gate.shared():
                still_wanted()
                await self._keep(entry.current, beside=version)
            await self._bring_back(version, entry, still_wanted)
            self._registry.roll_back(entry)

    async def remove(self, versions: list[Version]) -> int:
        """Take versions that nothing uses out of memory, and what requests can name no more out of the
        prompt cache; they are out of the registry already. Returns the bytes that this freed."""
        self.forget_copies(versions)
        there = [version for version in versions if version.in_memory]
        for version in there:
            self._residency.drop(version)
        forgotten = {version.resident.digest for version in versions} - self._registry.digests()
        freed_bytes = await remove_residents(
            self._container, [version.resident for version in there], forgotten
        )
        self.look_again()
        return freed_bytes

    def forget_copies(self, versions: Iterable[Version]) -> None:
        """Those of versions that are out of the registry, and out of memory or about to leave it."""
        for version in versions:
            self._keeper.drop(version)

    @property
    def _is_crowded(self) -> bool:
        return self._awaiting_loads >= self._max_waiting

    def _take(
        self, names: Sequence[tuple[str | None, Terms | None]], is_counted: bool, is_next: bool
    ) -> _Taken | None:
        resolved = [self._registry.resolve(model, adapters) for model, adapters in names]
        entries = {
            version: entry
            for each in resolved
            for version, entry in zip(each.versions, each.entries, strict=True)
        }
        versions = tuple(entries) if self._registry.fused is None else ()
        if self._is_crowded and not all(version.in_memory for version in versions):
            return None
        reservations = self._residency.take(versions, is_next)
        if reservations is None:
            return None
        pins = [self._registry.keep(each, is_counted) for each in resolved]
        for version, reservation in zip(versions, reservations, strict=True):
            if reservation is not None:
                self._start_reload(entries[version], version, reservation)
        return pins, versions, [self._loads[version] for version in versions if version in self._loads]

    def _start_reload(self, entry: Entry | None, version: Version, reservation: Reservation) -> None:
        self._gate.enter()
        self._loads[version] = self._start(self._reload(entry, version, reservation))

    async def _bring_back(self, version: Version, entry: Entry | None, check: Callable[[], None]) -> None:
        """Have `version`, which is kept, in memory, in the place of the current version of `entry`."""

        def attempt(is_next: bool) -> list[asyncio.Task[None]] | None:
            check()
            if not version.in_memory and version not in self._loads:
                replaces = None if entry is None else entry.current
                reservation = self._residency.reserve(version.size_bytes, replaces, is_next)
                if reservation is None:
                    return None
                version.loading = True
                self._start_reload(entry, version, reservation)
            return [self._loads[version]] if version in self._loads else []

        while loads := await self._in_turn(attempt, version.size_bytes):
            await asyncio.wait(loads)
            loads[0].result()

    async def _reserve_in_turn(
        self, size_bytes: int, entry: Entry | None, check: Callable[[], None]
    ) -> Reservation:
        return await self._in_turn(partial(self._reserve, size_bytes, entry, check), size_bytes)

    async def _in_turn(self, attempt: Attempt[_T], size_bytes: int) -> _T:
        """As the line's, for a call, which is told how much memory it would have needed."""
        try:
            return await self._line.in_turn(attempt, self._wait_seconds)
        except AdapterMemoryBusyError:
            needed_bytes = self._residency.committed_bytes + size_bytes
            raise AdapterMemoryError(needed_bytes, self._residency.limit_bytes) from None

    def _reserve(
        self, size_bytes: int, entry: Entry | None, check: Callable[[], None], is_next: bool
    ) -> Reservation | None:
        check()
        replaces = None if entry is None else entry.current
        reservation = self._residency.reserve(size_bytes, replaces, is_next)
        if reservation is not None:
            self._gate.enter()
        return reservation

    async def _fetch(
        self,
        folder: AdapterFolder,
        entry: Entry | None,
        reservation: Reservation | None,
        accept: Accept | None = None,
        may_evict: bool = True,
    ) -> Version:
        async with self._readers:
            started = time.perf_counter()
            try:
                prepared = await prepare_folder(folder, await self._the_bank(), self._residency.limit_bytes)
                if accept is not None:
                    await accept(prepared)
                if entry is not None:
                    await self._keep(entry.current)
            except BaseException:
                self._give_up(reservation)
                raise
            return await self._place(prepared, folder, entry, reservation, started, may_evict)

    async def _place(
        self,
        prepared: PreparedAdapter,
        source: Source,
        entry: Entry | None,
        reservation: Reservation | None,
        started: float,
        may_evict: bool = True,
    ) -> Version:
        """A new version of what was prepared: in memory if the reservation, or another at once, suffices."""
        size_bytes = prepared.resident.size_bytes
        if reservation is None or reservation.size_bytes < size_bytes:
            self._give_up(reservation)
            replaces = None if entry is None else entry.current
            is_next = not len(self._line) and (may_evict or self._residency.has_room(size_bytes))
            reservation = self._residency.reserve(size_bytes, replaces, is_next)
        version = Version(0, prepared.resident, source)
        if reservation is not None:
            await self._add(prepared, version, reservation)
        version.number = _next_number(entry)
        version.load_seconds = time.perf_counter() - started
        return version

    async def _reload(self, entry: Entry | None, version: Version, reservation: Reservation) -> None:
        """Bring back a version that left memory, or publish what its folder holds in its place."""
        was_current = entry is not None and entry.current is version
        try:
            async with self._readers:
                started = time.perf_counter()
                source, prepared = await self._read_again(version)
                if prepared.resident.digest == version.resident.digest:
                    await self._add(known_as(prepared, version.resident), version, reservation)
                    version.load_seconds = time.perf_counter() - started
                    self._residency.cold_loads += 1
                elif entry is not None and entry.current is version:
                    await self._succeed(entry, version, prepared, source, reservation, started)
                elif not was_current:
                    raise VersionGoneError(version.resident.digest)  # else whoever waits would try for ever
                self._on_load(time.perf_counter() - started)
        finally:
            self._give_up(reservation)
            version.loading = False
            del self._loads[version]
            self._gate.leave()

    async def _read_again(self, version: Version) -> tuple[Source, PreparedAdapter]:
        """What the copy of a version holds, or its folder if there is no copy, and where that lies."""
        if version.kept:
            return version.source, await self._keeper.read(version)
        bank, limit_bytes = await self._the_bank(), self._residency.limit_bytes
        return await prepare_again(self._folders, version.folder, bank, limit_bytes)

    async def _keep(self, version: Version, beside: Version | None = None) -> None:
        """Copy `version` aside, out of memory or from its folder, if that can be. As `Keeper.keep`."""
        if await self._keeper.keep(version, beside=beside) or version.in_memory:
            return
        try:
            _, prepared = await self._read_again(version)
        except (InvalidAdapterError, LifeCycleError):
            return  # its folder is what replaces it, or has gone
        if prepared.resident.digest == version.resident.digest:
            await self._keeper.keep(version, prepared, beside)

    @contextmanager
    def _keeping_if_it_succeeds(self, entry: Entry | None) -> Iterator[None]:
        """Whoever fails to replace the current version of `entry` leaves no copy of it behind."""
        replaced = None if entry is None or entry.current.kept else entry.current
        try:
            yield
        except BaseException:
            # If another has replaced it meanwhile, the copy is what a rollback needs.
            if replaced is not None and entry is not None and entry.previous is not replaced:
                self._keeper.drop(replaced)
            raise

    async def _forget(self, version: Version) -> None:
        """Nothing comes of a version that was never published."""
        async with self._gate.shared():
            await self.remove([version])

    async def _succeed(
        self,
        entry: Entry,
        version: Version,
        prepared: PreparedAdapter,
        source: Source,
        reservation: Reservation,
        started: float,
    ) -> None:
        if isinstance(source, AdapterFolder) and not await asyncio.to_thread(self._is_settled, source):
            raise AdapterChangingError(entry.id)
        new = await self._place(prepared, source, entry, reservation, started)
        if entry.current is not version:  # a call was faster; what it loaded counts
            self._registry.retire(entry, new)
            return
        self._registry.publish(entry.id, new)
        _log.warning(
            "adapter_folder_changed",
            adapter=entry.id,
            version=new.number,
            digest=new.resident.digest,
            before=version.resident.digest,
        )
        self._on_change(entry.id, new)

    async def _add(self, prepared: PreparedAdapter, version: Version, reservation: Reservation) -> None:
        """Put `version` into the bank in the place of what leaves for it; if it raises, what left is cold."""
        reservation.size_bytes = version.size_bytes
        try:
            leaving = self._residency.make_room(reservation)
            unfinished = await exchange(self._container, prepared, [each.resident for each in leaving])
            if unfinished is not None:
                for each in leaving:
                    if each.resident in unfinished.residents:
                        self._residency.put(each)
                raise unfinished.error
        except BaseException:
            self._give_up(reservation)
            raise
        self._residency.settle(reservation, version)
        if leaving:
            _log.debug("adapters_evicted", count=len(leaving))

    def _give_up(self, reservation: Reservation | None) -> None:
        if reservation is not None:
            self._residency.cancel(reservation)
            self.look_again()

    async def _the_bank(self) -> AdapterBank:
        if self._bank is None:
            self._bank = await self._container.perform(lambda context: context.bank)
        return self._bank


def _next_number(entry: Entry | None) -> int:
    return 1 if entry is None else entry.newest.number + 1


def _release(pins: Sequence[Pin]) -> None:
    for pin in pins:
        pin.release()

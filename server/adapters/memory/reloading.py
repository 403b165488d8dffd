"""Brings versions back that left memory, one load for all who want the same. Runs on the event loop."""

from __future__ import annotations

import asyncio
import time

from adapters_core.bank import PreparedAdapter

from ..errors import AdapterChangingError, VersionGoneError
from ..folder import AdapterFolder
from ..gate import Gate
from ..registry import Registry
from ..reports import Journal
from ..source import Source
from ..unloading import Unloader
from ..versions import Entry, Version
from .loading import known_as
from .memory import Memory
from .placing import Placer
from .residency import Reservation

__all__ = ["Reloader"]


class Reloader:
    """The reloads that are under way. They go on to their end, inside the gate, whoever waits for them."""

    def __init__(
        self,
        registry: Registry,
        memory: Memory,
        gate: Gate,
        placer: Placer,
        unloader: Unloader,
        journal: Journal,
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._gate = gate
        self._placer = placer
        self._unloader = unloader
        self._journal = journal
        self._loads: dict[Version, asyncio.Task[None]] = {}

    def load_of(self, version: Version) -> asyncio.Task[None] | None:
        """The reload of a version, if one is under way."""
        return self._loads.get(version)

    def start(self, entry: Entry | None, version: Version, reservation: Reservation) -> asyncio.Task[None]:
        """Bring back `version` of `entry` into the room that was reserved; the gate is open."""
        version.loading = True
        self._gate.enter()
        work = self._reload(entry, version, reservation)
        self._loads[version] = self._unloader.start(work)
        return self._loads[version]

    async def _reload(self, entry: Entry | None, version: Version, reservation: Reservation) -> None:
        """Bring back a version that left memory, or publish what its folder holds in its place."""
        reader = self._placer.reader
        was_current = entry is not None and entry.current is version
        try:
            async with reader.turns:
                started = time.perf_counter()
                source, prepared = await reader.again(version)
                if prepared.resident.digest == version.resident.digest:
                    await self._memory.add(known_as(prepared, version.resident), version, reservation)
                    version.load_seconds = time.perf_counter() - started
                    self._memory.residency.cold_loads += 1
                elif entry is not None and entry.current is version:
                    await self._succeed(entry, version, prepared, source, reservation, started)
                elif not was_current:
                    raise VersionGoneError(version.resident.digest)  # else whoever waits would try for ever
                self._journal.reloaded(time.perf_counter() - started)
        finally:
            self._memory.give_up(reservation)
            version.loading = False
            del self._loads[version]
            self._gate.leave()

    async def _succeed(
        self,
        entry: Entry,
        version: Version,
        prepared: PreparedAdapter,
        source: Source,
        reservation: Reservation,
        started: float,
    ) -> None:
        reader = self._placer.reader
        if isinstance(source, AdapterFolder) and not await reader.has_settled(source):
            raise AdapterChangingError(entry.id)
        new = await self._placer.place(prepared, source, entry, reservation, started)
        if entry.current is not version:  # a call was faster; what it loaded counts
            self._registry.retire(entry, new)
            return
        self._registry.publish(entry.id, new)
        self._journal.changed(entry.id, new, version)

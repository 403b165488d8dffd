"""Brings versions back that left memory, one load for all who want the same. Runs on the event loop."""

from __future__ import annotations

import asyncio
import time

from adapters_core.bank import PreparedAdapter

from ..errors import VersionGoneError
from ..memory.loading import known_as
from ..memory.memory import Memory
from ..memory.residency import Reservation
from ..registry import Registry
from ..reports import Journal
from ..source import Made
from ..unloading import Unloader
from ..versions import Entry, Version
from .placing import Placer, Wish

__all__ = ["Reloader"]


class Reloader:
    """The reloads that are under way. They go on to their end, inside the gate, whoever waits for them."""

    def __init__(
        self,
        registry: Registry,
        memory: Memory,
        placer: Placer,
        unloader: Unloader,
        journal: Journal,
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._placer = placer
        self._unloader = unloader
        self._journal = journal
        self._loads: dict[Version, asyncio.Task[None]] = {}

    def load_of(self, version: Version) -> asyncio.Task[None] | None:
        """The reload of a version, if one is under way."""
        return self._loads.get(version)

    def start(self, entry: Entry | None, version: Version, reservation: Reservation) -> asyncio.Task[None]:
        """Bring back `version` of `entry` into the room that was reserved, inside the gate (see `enter`)."""
        version.loading = True
        self._memory.gate.enter()
        work = self._reload(entry, version, reservation)
        self._loads[version] = self._unloader.start(work)
        return self._loads[version]

    async def _reload(self, entry: Entry | None, version: Version, reservation: Reservation) -> None:
        """Bring back a version that left memory, or publish what its folder holds in its place."""
        was_current = entry is not None and entry.current is version
        try:
            async with self._placer.reader.turns:
                started = time.perf_counter()
                prepared = await self._read(entry, version)
                if prepared.resident.digest == version.resident.digest:
                    await self._memory.add(known_as(prepared, version.resident), version, reservation)
                    version.load_seconds = time.perf_counter() - started
                    self._memory.residency.cold_loads += 1
                elif entry is not None and entry.current is version:
                    await self._succeed(entry, version, prepared, reservation)
                elif not was_current:
                    # Else whoever waits would try for ever.
                    raise VersionGoneError(version.resident.digest)
            self._journal.reloaded(time.perf_counter() - started)
        finally:
            self._memory.give_up(reservation)
            version.loading = False
            del self._loads[version]
            self._memory.gate.leave()

    async def _read(self, entry: Entry | None, version: Version) -> PreparedAdapter:
        """What `version` is, or what its folder holds in its place, if that may be served.

        What was loaded last of a folder is looked for there first, anything else in its copy.
        """
        source, reader = version.source, self._placer.reader
        is_last = entry is not None and version is entry.current is entry.newest
        if entry is None or isinstance(source, Made) or (version.kept and not is_last):
            return await reader.copy(version)
        return await reader.again(entry.id, version, source)

    async def _succeed(
        self, entry: Entry, version: Version, prepared: PreparedAdapter, reservation: Reservation
    ) -> None:
        """Make what was read of the folder of `version` the next version, which need not be in memory."""
        if isinstance(version.source, Made):
            return
        wish = Wish(entry.id, version.source, entry)
        new = await self._placer.place(wish, prepared, reservation=reservation, even_cold=True)
        if entry.current is not version:  # a call was faster; what it loaded counts
            self._registry.retire(entry, new)
            return
        self._registry.publish(entry.id, new)
        self._journal.changed(entry.id, new, version)

"""Brings what has a private copy into memory, for calls: what is rolled back to, and what was made.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from adapters_core.layers.module_weights import ModuleWeights

from ..errors import NoPreviousVersionError, VersionNotKeptError, quoted
from ..keeping.keeper import Keeper
from ..memory.memory import Memory
from ..memory.residency import Reservation
from ..registry import Registry
from ..source import Made
from ..versions import Entry, Version
from .reading import Reader
from .reloading import Reloader

__all__ = ["Returner"]


@dataclass(slots=True)
class _Room:
    """Inside the gate: room for a version, unless it is in memory or `load` brings it there."""

    load: asyncio.Task[None] | None
    reservation: Reservation | None = None


async def _nothing() -> None:
    """What is brought back is kept already."""


class Returner:
    """Waits in line, outside the gate, for the room that such a version takes."""

    def __init__(
        self,
        registry: Registry,
        memory: Memory,
        keeper: Keeper,
        reader: Reader,
        reloader: Reloader,
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._keeper = keeper
        self._reader = reader
        self._reloader = reloader

    async def place_made(
        self, adapter_id: str, made: Made, weights: Mapping[str, ModuleWeights], entry: Entry | None
    ) -> Version:
        """The next version of `entry`, or the first of the id, in memory: what was made, from its copy.

        Whoever asks publishes it at the very instant at which this returns.

        Raises:
            InvalidAdapterError, BaseIsFusedError
            AdapterMemoryError: there was no room for it in time.
            VersionNotKeptError: no copy of it could be kept.
        """
        refused = f"{quoted(adapter_id)} cannot be loaded"
        started = time.perf_counter()
        async with self._memory.gate.shared():
            self._registry.refuse_if_fused(refused)
            async with self._reader.turns:
                resident = await self._reader.made(adapter_id, weights)
            self._memory.residency.require_possible(resident.size_bytes, _current_of(entry))
        version = Version(0, resident, made)

        async def keep() -> None:
            if not version.kept and not await self._keeper.keep_made(version, weights, _current_of(entry)):
                raise VersionNotKeptError(adapter_id)

        try:
            await self._bring_back(version, entry, lambda: self._registry.refuse_if_fused(refused), keep)
        except BaseException:
            self._keeper.drop(version)  # nothing comes of what was never published
            async with self._memory.gate.shared():
                await self._memory.remove([version], ())
            raise
        version.load_seconds = time.perf_counter() - started
        return version

    async def roll_back(self, entry: Entry) -> None:
        """Make the previous version of `entry` the current one again, in memory.

        If this raises, nothing has changed.

        Raises:
            NoPreviousVersionError: there is none.
            VersionGoneError, VersionUnreadableError: its copy is not what was kept, or cannot be read now.
            AdapterMemoryError: there was no room for it in time.
            BaseIsFusedError
        """
        version = entry.previous

        def check() -> None:
            self._registry.refuse_if_fused(f"{quoted(entry.id)} cannot be rolled back")
            if version is None or entry.previous is not version:
                raise NoPreviousVersionError(entry.id, entry.current.number)

        check()
        if version is not None:
            await self._bring_back(version, entry, check)
            self._registry.roll_back(entry)

    async def _bring_back(
        self,
        version: Version,
        entry: Entry | None,
        check: Callable[[], None],
        keep: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        """Have `version`, once `keep` has seen to its copy, in memory, in the place of the current one.

        At the instant at which this returns, `check` holds, and the current version of `entry` is kept as far
        as it can be. No copy is made, nor given up for one, before there is room in memory.
        """

        def attempt(is_next: bool) -> _Room | None:
            check()
            room = _Room(self._reloader.load_of(version))
            if room.load is None and not version.in_memory:
                room.reservation = self._memory.residency.reserve(
                    version.size_bytes, _current_of(entry), is_next
                )
                if room.reservation is None:
                    return None
            self._memory.gate.enter()
            return room

        while True:
            room = await self._memory.in_turn(attempt, version.size_bytes)
            try:
                async with self._reader.turns:
                    await self._keeper.keep_current(entry, beside=version)
                await keep()  # waits for nothing if that was done, so that the one above still holds
                if version.in_memory:
                    check()
                    return
                load = self._reloader.load_of(version)
                if load is None and room.reservation is not None:
                    load = self._reloader.start(entry, version, room.reservation)
                    room.reservation = None  # it is the load's
            finally:
                self._memory.give_up(room.reservation)
                self._memory.gate.leave()
            if load is not None:
                await asyncio.wait({load})
                load.result()


def _current_of(entry: Entry | None) -> Version | None:
    return None if entry is None else entry.current

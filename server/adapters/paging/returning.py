"""Brings what has a private copy into memory, for calls: what is rolled back to, and what was made.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from adapters_core.layers.module_weights import ModuleWeights

from ..errors import NoPreviousVersionError, VersionNotKeptError, quoted
from ..keeping.keeper import Keeper
from ..memory.memory import Memory
from ..registry import Registry
from ..source import Made
from ..versions import Entry, Version
from .reading import Reader
from .reloading import Reloader

__all__ = ["Returner"]


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
            version = Version(0, resident, made)
            if not await self._keeper.keep_made(version, weights):
                raise VersionNotKeptError(adapter_id)
        try:
            await self._bring_back(version, entry, lambda: self._registry.refuse_if_fused(refused))
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
            VersionGoneError: its copy cannot be read.
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

    async def _bring_back(self, version: Version, entry: Entry | None, check: Callable[[], None]) -> None:
        """Have `version`, which is kept, in memory, in the place of the current version of `entry`.

        At the instant at which this returns, that is kept as well, as far as it can be.
        """

        def attempt(is_next: bool) -> list[asyncio.Task[None]] | None:
            check()
            load = self._reloader.load_of(version)
            if load is None and not version.in_memory:
                replaces = None if entry is None else entry.current
                reservation = self._memory.residency.reserve(version.size_bytes, replaces, is_next)
                if reservation is None:
                    return None
                load = self._reloader.start(entry, version, reservation)
            return [] if load is None else [load]

        kept: Version | None = None
        while True:
            if entry is not None and kept is not entry.current:
                async with self._memory.gate.shared():
                    check()
                    kept = entry.current
                    await self._keeper.keep(kept, beside=version)
            loads = await self._memory.in_turn(attempt, version.size_bytes)
            if loads:
                await asyncio.wait(loads)
                loads[0].result()
            elif entry is None or kept is entry.current:
                return

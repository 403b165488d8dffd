"""Loads the contents of folders as new versions, beside the generation. Runs on the event loop.

While a load changes memory it is inside the gate; while it waits for room it is not, so that surgery on the
base waits for no request. What is about to be replaced is copied aside first.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adapters_core.bank import PreparedAdapter

from ..errors import quoted
from ..folder import AdapterFolder
from ..keeping.keeper import Keeper
from ..memory.memory import Memory
from ..memory.residency import Reservation
from ..registry import Registry
from ..versions import Entry, Version
from .reading import Reader

__all__ = ["Accept", "Placer", "Wish"]

Accept = Callable[[PreparedAdapter], Awaitable[None]]
"""Raises if what was read is not to be loaded after all."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What `folder` holds, as the next version of `entry`, or as the first of `adapter_id`."""

    adapter_id: str
    folder: AdapterFolder
    entry: Entry | None = None
    accept: Accept | None = None


class Placer:
    """Makes new versions, which whoever asks publishes at the very instant at which it gets them."""

    def __init__(self, registry: Registry, memory: Memory, keeper: Keeper, reader: Reader) -> None:
        self.reader = reader
        self._registry = registry
        self._memory = memory
        self._keeper = keeper

    async def load(
        self, wish: Wish, reservation: Reservation | None = None, *, may_evict: bool = True
    ) -> Version:
        """Load what is in a folder now, into the room that was reserved if that is enough.

        Call it inside the gate. If there is no room at once, the version is not in memory yet; without
        `may_evict`, nothing makes room for it. If this raises, nothing has changed, but that the reservation
        is given up.

        Raises:
            InvalidAdapterError: everything that is wrong with the folder or does not fit the model.
            AdapterMemoryError: it can never fit.
            Whatever `wish.accept` raises.
        """
        before = None if wish.entry is None else wish.entry.current
        async with self.reader.turns:
            started, copy = time.perf_counter(), None
            try:
                await self._keeper.keep_current(wish.entry)
                copy = await self._keeper.copy_files(wish.folder, beside=before)
                prepared = await self.reader.folder(wish.folder if copy is None else copy.folder)
                if wish.accept is not None:
                    await wish.accept(prepared)
                version = await self._place(wish, prepared, reservation, may_evict)
            except BaseException:
                self._memory.give_up(reservation)
                self._keeper.discard(copy)
                raise
            self._keeper.adopt(version, copy)
            version.load_seconds = time.perf_counter() - started
        await self._keeper.keep_current(wish.entry)  # a request may have found another meanwhile
        return version

    async def load_in_turn(self, wish: Wish) -> Version:
        """As `load`, outside the gate: waits for room, so that what comes is in memory.

        Raises:
            As `load`; AdapterMemoryError also if there was no room in time; BaseIsFusedError.
        """
        async with self._memory.gate.shared():
            self._check(wish)
            version = await self.load(wish)
        while not version.in_memory:
            # What was read is let go of: those who wait hold nothing.
            self._keeper.drop(version)
            reservation = await self._reserve_in_turn(wish, version.size_bytes)
            try:
                version = await self.load(wish, reservation)
            finally:
                self._memory.gate.leave()
        return version

    async def _place(
        self, wish: Wish, prepared: PreparedAdapter, reservation: Reservation | None, may_evict: bool
    ) -> Version:
        """A new version of what was prepared: in memory if the reservation, or another at once, suffices."""
        size_bytes, residency = prepared.resident.size_bytes, self._memory.residency
        if reservation is None or reservation.size_bytes < size_bytes:
            self._memory.give_up(reservation)
            is_next = not len(self._memory.line) and (may_evict or residency.has_room(size_bytes))
            replaces = None if wish.entry is None else wish.entry.current
            reservation = residency.reserve(size_bytes, replaces, is_next)
        version = Version(0, prepared.resident, wish.folder)
        if reservation is not None:
            await self._memory.add(prepared, version, reservation)
        return version

    async def _reserve_in_turn(self, wish: Wish, size_bytes: int) -> Reservation:
        """Room for a version, inside the gate from the instant at which there is some."""

        def attempt(is_next: bool) -> Reservation | None:
            self._check(wish)
            replaces = None if wish.entry is None else wish.entry.current
            reservation = self._memory.residency.reserve(size_bytes, replaces, is_next)
            if reservation is not None:
                self._memory.gate.enter()
            return reservation

        return await self._memory.in_turn(attempt, size_bytes)

    def _check(self, wish: Wish) -> None:
        self._registry.refuse_if_fused(f"{quoted(wish.adapter_id)} cannot be loaded")

"""Loads the contents of folders as new versions, beside the generation. Runs on the event loop.

While a load changes memory it is inside the gate; while it waits for room it is not, so that surgery on the
base waits for no request. A folder is copied into free room and the copy read; without such room the folder
is read. What is about to be replaced is kept as soon as there is room in memory for what replaces it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adapters_core.bank import PreparedAdapter

from ..copies import Copy
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
        async with self.reader.turns:
            return await self._load(wish, reservation, may_evict, even_cold=True)

    async def load_in_turn(self, wish: Wish) -> Version:
        """As `load`, outside the gate: waits for room, so that what comes is in memory.

        Raises:
            As `load`; AdapterMemoryError also if there was no room in time; BaseIsFusedError.
        """
        async with self._memory.gate.shared():
            self._check(wish)
            async with self.reader.turns:
                version = await self._load(wish)
        while not version.in_memory:
            # What was read is let go of: those who wait hold nothing.
            self._keeper.drop(version)
            reservation = await self._reserve_in_turn(wish, version.size_bytes)
            try:
                async with self.reader.turns:
                    version = await self._load(wish, reservation)
            finally:
                self._memory.gate.leave()
        return version

    async def place(
        self,
        wish: Wish,
        prepared: PreparedAdapter,
        copy: Copy | None = None,
        reservation: Reservation | None = None,
        *,
        may_evict: bool = True,
        even_cold: bool = False,
    ) -> Version:
        """A new version of what was read, of which `copy` is one: in memory if there is room at once.

        Call it inside the gate, with a turn to read. Nothing is kept, and no other copy given up for that,
        before it has room, unless it is wanted `even_cold`. Raises as `load`; then the copy and the
        reservation are given up.
        """
        version = Version(0, prepared.resident, wish.folder)
        self._keeper.adopt(version, copy)
        try:
            reservation = self._reserve(wish, version.size_bytes, reservation, may_evict)
            if reservation is not None or even_cold:
                await self._keep(version, wish.entry)
            if reservation is not None:
                await self._memory.add(prepared, version, reservation)
            if reservation is not None or even_cold:
                await self._keeper.keep_current(wish.entry)  # a request may have found another meanwhile
        except BaseException:
            self._memory.give_up(reservation)
            self._keeper.drop(version)
            raise
        return version

    async def _load(
        self,
        wish: Wish,
        reservation: Reservation | None = None,
        may_evict: bool = True,
        even_cold: bool = False,
    ) -> Version:
        """As `place`, of what is in the folder now."""
        started, copy = time.perf_counter(), None
        try:
            await self.reader.refuse_too_large(wish.folder)
            if self._is_copied_first(wish):
                copy = await self._keeper.copy_files(wish.folder)
            prepared = await self.reader.folder(wish.folder if copy is None else copy.folder)
            if wish.accept is not None:
                await wish.accept(prepared)
        except BaseException:
            self._memory.give_up(reservation)
            self._keeper.discard(copy)
            raise
        version = await self.place(
            wish, prepared, copy, reservation, may_evict=may_evict, even_cold=even_cold
        )
        version.load_seconds = time.perf_counter() - started
        return version

    def _is_copied_first(self, wish: Wish) -> bool:
        """Not what may turn out to be nothing new, nor before what is replaced, if that has no copy yet."""
        return wish.entry is None or (wish.accept is None and wish.entry.current.kept)

    async def _keep(self, version: Version, entry: Entry | None) -> None:
        """Keep what is replaced; then, if that costs no rollback, the files of what replaces it."""
        await self._keeper.keep_current(entry)
        beside = None if entry is None else entry.current
        await self._keeper.keep(version, beside, may_cost_rollbacks=False)

    def _reserve(
        self, wish: Wish, size_bytes: int, reservation: Reservation | None, may_evict: bool
    ) -> Reservation | None:
        """The room that was reserved if that is enough, else other room if there is some at once."""
        if reservation is not None and reservation.size_bytes >= size_bytes:
            return reservation
        self._memory.give_up(reservation)
        residency = self._memory.residency
        is_next = not len(self._memory.line) and (may_evict or residency.has_room(size_bytes))
        replaces = None if wish.entry is None else wish.entry.current
        return residency.reserve(size_bytes, replaces, is_next)

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

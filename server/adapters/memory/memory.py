"""The bank and the books of what lies in it, changed together. Runs on the event loop.

What comes in is added in one update that first removes what has to leave for it. Knows no names or folders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

import structlog

from adapters_core.bank import AdapterBank, PreparedAdapter
from server.engine.container import ModelContainer

from ..errors import AdapterMemoryBusyError, AdapterMemoryError
from ..gate import Gate
from ..versions import Version
from .line import Attempt, Line
from .loading import exchange, remove_residents
from .residency import Reservation, Residency
from .updates import BankUpdates

__all__ = ["Memory"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class Memory:
    """The bank of the model in `container`, its books, and the line of those who wait for room in it.

    What changes it is inside `gate`.
    """

    def __init__(self, container: ModelContainer, gate: Gate, residency: Residency, line: Line) -> None:
        self.gate = gate
        self.residency = residency
        self.line = line
        self._container = container
        self._updates = BankUpdates(container)
        self._bank: AdapterBank | None = None

    async def bank(self) -> AdapterBank:
        """The bank, for what does not change it."""
        if self._bank is None:
            self._bank = await self._container.perform(lambda context: context.bank)
        return self._bank

    async def bytes_taken(self) -> int:
        """What the bank really takes, free slots included; as of now, beside a change that is under way."""
        return (await self.bank()).resident_bytes

    async def copy_of(self, version: Version) -> PreparedAdapter | None:
        """What the bank has of `version`, copied; None if it is not in memory."""
        return await self._container.perform(lambda context: context.bank.copy_of(version.resident))

    async def in_turn(self, attempt: Attempt[_T], size_bytes: int) -> _T:
        """As the line's, for a call, which is told how much memory it would have needed.

        Raises:
            AdapterMemoryError: there was no room for `size_bytes` in time.
        """
        try:
            return await self.line.in_turn(attempt)
        except AdapterMemoryBusyError:
            needed_bytes = self.residency.committed_bytes + size_bytes
            raise AdapterMemoryError(needed_bytes, self.residency.limit_bytes) from None

    async def add(self, prepared: PreparedAdapter, version: Version, reservation: Reservation) -> None:
        """Put `version` into the bank in the place of what leaves for it; if it raises, what left is cold."""
        reservation.size_bytes = version.size_bytes
        try:
            leaving = self.residency.make_room(reservation)
            unfinished = await exchange(self._updates, prepared, [each.resident for each in leaving])
            if unfinished is not None:
                for each in leaving:
                    if each.resident in unfinished.residents:
                        self.residency.put(each)
                raise unfinished.error
        except BaseException:
            self.give_up(reservation)
            raise
        self.residency.settle(reservation, version)
        if leaving:
            _log.debug("adapters_evicted", count=len(leaving))

    def give_up(self, reservation: Reservation | None) -> None:
        """Nothing comes of a reservation, or something has come already."""
        if reservation is not None:
            self.residency.cancel(reservation)
            self.line.look_again()

    async def remove(self, versions: Iterable[Version], forgotten: Collection[str]) -> int:
        """Take those of `versions` that are here out, and what was computed with the digests `forgotten` out
        of the prompt cache. Nothing uses them. Returns the bytes that this freed in the bank."""
        there = [version for version in versions if version.in_memory]
        for version in there:
            self.residency.drop(version)
        residents = [version.resident for version in there]
        freed_bytes = await remove_residents(self._updates, residents, forgotten)
        self.line.look_again()
        return freed_bytes

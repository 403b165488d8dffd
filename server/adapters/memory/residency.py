"""Which versions are in memory, within a budget of bytes: what may come in, and what leaves for it.

Bytes are *committed* while requests use them, while they are pinned, and while a load has reserved them. All
other bytes in memory are idle, and any of them may leave, least recently used first. So something new fits
exactly if it and what is committed stay within the budget, and what has to leave for it always can.

A request commits all that it names or nothing, whether that is in memory or not: two requests never hold each
what the other waits for. Plain state, changed at one instant each time; nothing here waits. Knows no names,
files or threads. Used on the event loop only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ..errors import AdapterMemoryError
from ..versions import Version

__all__ = ["Reservation", "Residency"]


@dataclass(eq=False, slots=True)
class Reservation:
    """Bytes that a load may fill. `replaces` is the version that leaves when the load has succeeded.

    `spent` once room was made for it, so that its bytes are about to be in memory.
    """

    size_bytes: int
    replaces: Version | None = None
    spent: bool = False


class Residency:
    """The versions in memory, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.evictions = 0
        """Versions that left memory for others, since the start."""
        self.cold_loads = 0
        """Versions that came back into memory, since the start."""
        self._versions: dict[Version, None] = {}  # least recently used first
        self._reservations: set[Reservation] = set()
        self._claimed: tuple[Version, ...] = ()
        self._bytes_held = 0

    @property
    def versions(self) -> list[Version]:
        """What is in memory, least recently used first."""
        return list(self._versions)

    @property
    def bytes_held(self) -> int:
        """Bytes of what is in memory."""
        return self._bytes_held

    @property
    def committed_bytes(self) -> int:
        """Bytes that cannot be given to anything else now."""
        return self._committed(self._reservations)

    def require_possible(self, size_bytes: int, replaces: Version | None) -> None:
        """Raises AdapterMemoryError if so many bytes never fit, in the place of `replaces` or beside it."""
        if not self._fits_as_it_is(size_bytes):
            self._require_possible(size_bytes, () if replaces is None else (replaces,))

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes more fit although nothing leaves."""
        return self._fits_as_it_is(size_bytes)

    def take(self, versions: Sequence[Version], is_next: bool) -> list[Reservation | None] | None:
        """Commit `versions`, each once, for a request that pins them at this instant; None if it has to wait.

        For each, the reservation of the load that it needs, or None where it is there or on its way. Unless
        it `is_next`, a request gets nothing that would keep those before it waiting for longer.

        Raises:
            AdapterMemoryError: they do not fit beside what is pinned, however long one waits.
        """
        fresh = [version for version in versions if not self._is_committed(version)]
        missing = [version for version in fresh if not version.in_memory]
        if missing and not self._fits_as_it_is(_total(missing)):
            self._require_possible(_total(versions), versions)
        if not is_next and (fresh or not set(versions).isdisjoint(self._claimed)):
            return None
        if fresh and not self._fits_as_it_is(_total(missing)):
            lacking_bytes = self.committed_bytes + _total(fresh) - self.limit_bytes
            if not self._is_enough(lacking_bytes, versions):
                return None
        for version in versions:
            self.touch(version)
        return [self._reserve_for(version) if version in missing else None for version in versions]

    def reserve(self, size_bytes: int, replaces: Version | None, is_next: bool) -> Reservation | None:
        """Commit bytes for a version that is to be added; None if that has to wait. Raises as `take`."""
        self.require_possible(size_bytes, replaces)
        if not is_next:
            return None
        leaving = () if replaces is None else (replaces,)
        reservation = Reservation(size_bytes, replaces)
        if not self._fits_as_it_is(size_bytes):
            lacking_bytes = self._committed({*self._reservations, reservation}) - self.limit_bytes
            if not self._is_enough(lacking_bytes, (), leaving):
                return None
        self._reservations.add(reservation)
        return reservation

    def make_room(self, reservation: Reservation) -> list[Version]:
        """The versions that leave memory so that those of `reservation` fit; from now on they are not there.

        Call it when the reservation's version is added, in the same step in which these are removed.

        Raises:
            AdapterMemoryError: nothing has left, for all that may would not be enough.
        """
        leaving: list[Version] = []
        held = self._bytes_held + sum(each.size_bytes for each in self._reservations if each.spent)
        for version in self._evictable(reservation):
            if held + reservation.size_bytes <= self.limit_bytes:
                break
            held -= version.size_bytes
            leaving.append(version)
        if held + reservation.size_bytes > self.limit_bytes:
            raise AdapterMemoryError(held + reservation.size_bytes, self.limit_bytes)
        for version in leaving:
            self.drop(version)
        reservation.spent = True
        self.evictions += sum(version is not reservation.replaces for version in leaving)
        return leaving

    def settle(self, reservation: Reservation, version: Version) -> None:
        """`version` is in memory, in the place of what was reserved."""
        self.cancel(reservation)
        self.put(version)

    def cancel(self, reservation: Reservation) -> None:
        """Nothing comes of a reservation, or it was settled."""
        self._reservations.discard(reservation)

    def put(self, version: Version) -> None:
        """`version` is in memory."""
        version.in_memory = True
        if version not in self._versions:
            self._bytes_held += version.size_bytes
        self._versions[version] = None

    def touch(self, version: Version) -> None:
        """`version` was used just now."""
        if version in self._versions:
            del self._versions[version]
            self._versions[version] = None

    def drop(self, version: Version) -> None:
        """`version` is not in memory any more."""
        version.in_memory = False
        if version in self._versions:
            del self._versions[version]
            self._bytes_held -= version.size_bytes

    def clear(self) -> None:
        """Nothing is in memory any more."""
        for version in self.versions:
            self.drop(version)

    def _is_committed(self, version: Version) -> bool:
        if version.loading or (version.in_memory and version.pins):
            return True
        replaced = any(reservation.replaces is version for reservation in self._reservations)
        return version.in_memory and version.pinned and not replaced

    def _reserve_for(self, version: Version) -> Reservation:
        reservation = Reservation(version.size_bytes)
        self._reservations.add(reservation)
        version.loading = True
        return reservation

    def _committed(self, reservations: Collection[Reservation]) -> int:
        replaced = {reservation.replaces: reservation for reservation in reservations}
        total = sum(reservation.size_bytes for reservation in reservations)
        for version in self._versions:
            if version.pins:
                total += version.size_bytes
            elif version.pinned:
                # A pinned version makes way for the one that replaces it, and for no other.
                successor = replaced.get(version)
                total += max(0, version.size_bytes - (successor.size_bytes if successor else 0))
        return total

    def _fits_as_it_is(self, new_bytes: int) -> bool:
        """Whether nothing has to leave for so many bytes: the usual case, and quick to see."""
        reserved_bytes = sum(reservation.size_bytes for reservation in self._reservations)
        return self._bytes_held + reserved_bytes + new_bytes <= self.limit_bytes

    def _require_possible(self, wanted_bytes: int, wanted: Collection[Version]) -> None:
        needed_bytes = wanted_bytes + _total(
            [version for version in self._versions if version.pinned and version not in wanted]
        )
        if needed_bytes > self.limit_bytes:
            raise AdapterMemoryError(needed_bytes, self.limit_bytes)

    def _is_enough(
        self, lacking_bytes: int, wanted: Collection[Version], leaving: Collection[Version] = ()
    ) -> bool:
        """Whether nothing is lacking for the one whose turn it is; if not, what it waits for is claimed."""
        enough = lacking_bytes <= 0
        self._claimed = () if enough else self._to_be_released(lacking_bytes, wanted, leaving)
        return enough

    def _to_be_released(
        self, lacking_bytes: int, wanted: Collection[Version], leaving: Collection[Version]
    ) -> tuple[Version, ...]:
        """Versions in use whose release would give so many bytes: those leaving, the least recently used.

        No new request gets them before the one that waits, so that its wait ends with requests under way now.
        What is claimed stays so, although each release makes it the most recently used.
        """
        claimed: list[Version] = []
        for version in dict.fromkeys((*leaving, *self._claimed, *self._versions)):
            if lacking_bytes <= 0:
                break
            movable = version in leaving or not version.pinned
            if version.in_memory and version.pins and movable and version not in wanted:
                claimed.append(version)
                lacking_bytes -= version.size_bytes
        return tuple(claimed)

    def _evictable(self, reservation: Reservation) -> Iterator[Version]:
        replaced = reservation.replaces
        if replaced is not None and replaced.in_memory and not replaced.pins:
            yield replaced
        for version in self._versions:
            if not version.pins and not version.pinned and version is not replaced:
                yield version


def _total(versions: Collection[Version]) -> int:
    return sum(version.size_bytes for version in versions)

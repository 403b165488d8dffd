"""Keeps what requests name, in memory: all or nothing, in turn. Runs on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from ..errors import AdapterMemoryBusyError
from ..memory.memory import Memory
from ..pins import Pin, Terms
from ..registry import Registry
from ..versions import Version
from .reloading import Reloader

__all__ = ["Pinner"]


@dataclass(frozen=True, slots=True)
class _Taken:
    """Pins on `versions`, and the loads of those that are not in memory yet."""

    pins: list[Pin]
    versions: tuple[Version, ...]
    loads: list[asyncio.Task[None]]

    def release(self) -> None:
        for pin in self.pins:
            pin.release()


class Pinner:
    """As many requests wait for loads at most as may wait in line for room."""

    def __init__(self, registry: Registry, memory: Memory, reloader: Reloader) -> None:
        self._registry = registry
        self._memory = memory
        self._reloader = reloader
        self._awaiting_loads = 0

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
            taken = await self._memory.line.in_turn(partial(self._take, names, is_counted))
            is_counted = True
            try:
                if taken.loads:
                    with self.waiting_for_load():
                        await asyncio.wait(taken.loads)
                    for load in taken.loads:
                        load.result()
                if all(version.in_memory for version in taken.versions):
                    return taken.pins
            except BaseException:
                taken.release()
                raise
            taken.release()  # a folder held something new, which is the adapter's next version now

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
            self._memory.line.look_again()

    @property
    def _is_crowded(self) -> bool:
        return self._awaiting_loads >= self._memory.line.max_waiting

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
        reservations = self._memory.residency.take(versions, is_next)
        if reservations is None:
            return None
        pins = [self._registry.keep(each, is_counted) for each in resolved]
        for version, reservation in zip(versions, reservations, strict=True):
            if reservation is not None:
                self._reloader.start(entries[version], version, reservation)
        found = (self._reloader.load_of(version) for version in versions)
        return _Taken(pins, versions, [load for load in found if load is not None])

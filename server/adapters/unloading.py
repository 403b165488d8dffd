"""Takes out of the bank what is unloaded, and old versions when their last request has ended.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import structlog

from .errors import quoted
from .keeping.keeper import Keeper
from .memory.memory import Memory
from .registry import Registry
from .releases import Releases
from .tasks import Tasks
from .versions import Entry, Version

__all__ = ["Unloader"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class Unloader:
    """What leaves the registry leaves memory, its private copies go, and who waits for that is told."""

    def __init__(
        self,
        registry: Registry,
        memory: Memory,
        keeper: Keeper,
        tasks: Tasks,
        releases: Releases,
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._keeper = keeper
        self._tasks = tasks
        self._releases = releases

    async def unload(self, adapter_id: str, timeout_seconds: float) -> tuple[Entry, int]:
        """Serve an adapter to no new request, wait for those in flight, take it out of the bank.

        Returns the entry as it was at the end and the bytes that were freed.

        Raises:
            AdapterNotFoundError: it is not loaded.
            AdapterBusyError: requests still use it when the time is up; it is served again.
            BaseIsFusedError: it, or another, is fused.
        """
        async with self._tasks.lock(adapter_id):
            async with self._memory.gate.shared():
                entry = self._registry.get(adapter_id)
                self._registry.refuse_if_fused("none can be unloaded")
                was_active = self._registry.start_draining(entry)
                self._memory.line.look_again()  # who waits for it is told at once that it is not served
            try:
                name = f"adapter {quoted(adapter_id)}"
                await self._releases.idle(lambda: entry.uses, timeout_seconds, name)
                await self._memory.gate.opened()
            except BaseException:
                self._registry.stop_draining(entry, was_active)
                raise
            async with self._memory.gate.shared():
                self._registry.remove(entry)
                freed_bytes = await self.remove(entry.versions)
            _log.info("adapter_unloaded", adapter=adapter_id, freed_bytes=freed_bytes)
            return entry, freed_bytes

    async def unload_if_idle(self, adapter_id: str, timeout_seconds: float) -> None:
        """Unload an adapter, and wait for that only if nothing uses it now; what goes wrong is logged."""
        entry = self._registry.find(adapter_id)
        if entry is None:
            return
        idle = not entry.uses
        task = self._tasks.start(self.unload(adapter_id, timeout_seconds))
        task.add_done_callback(lambda done: _log_failure(adapter_id, done))
        if idle:
            await asyncio.wait({task})

    async def idle(self, in_flight: Callable[[], int], timeout_seconds: float, what: str) -> None:
        """Wait until `in_flight()` is 0. Raises AdapterBusyError, which names `what`, when the time is up."""
        await self._releases.idle(in_flight, timeout_seconds, what)

    async def remove(self, versions: Sequence[Version]) -> int:
        """Take versions that nothing uses out of memory, and what requests can name no more out of the
        prompt cache; they are out of the registry already. Returns the bytes that this freed."""
        self.forget_copies(versions)
        digests = {version.resident.digest for version in versions}
        return await self._memory.remove(versions, digests - self._registry.digests())

    def forget_copies(self, versions: Iterable[Version]) -> None:
        """Those of versions that are out of the registry, and out of memory or about to leave it."""
        for version in versions:
            self._keeper.drop(version)

    async def reap(self) -> None:
        """Take the versions out of the bank that were replaced and that no request uses any more."""
        async with self._memory.gate.shared():
            stale = self._registry.take_stale()
            if stale:
                await self.remove(stale)

    def released(self, versions: Sequence[Version] = ()) -> None:
        """Requests, or loads, use `versions` less than before."""
        for version in versions:
            self._memory.residency.touch(version)
        self._releases.look_again()
        self._memory.line.look_again()
        if self._registry.has_stale:
            self._tasks.start(self.reap())

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Begin `work`, which uses versions until it has ended."""
        task = self._tasks.start(work)
        task.add_done_callback(lambda _: self.released())
        return task


def _log_failure(adapter_id: str, task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.warning("previous_adapter_not_unloaded", adapter=adapter_id, reason=str(error))

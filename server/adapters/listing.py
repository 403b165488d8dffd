"""What there is: adapters that are registered, folders that could be, checkpoints. Runs on the event loop.

The file system is read on worker threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from .folder import AdapterFolder, AdapterFolders
from .memory.memory import Memory
from .registry import Registry
from .versions import Entry

__all__ = ["Lister", "Listing"]


@dataclass(frozen=True, slots=True)
class Listing:
    """`resident_bytes` is what the bank takes; `available` are ids that could be loaded.

    `checkpoints` are the steps that trainings have written, by the id that their folder under the root gives.
    """

    entries: list[Entry]
    resident_bytes: int
    available: list[str]
    checkpoints: dict[str, list[int]]


class Lister:
    """Looks at the registry, the bank and the folders."""

    def __init__(self, registry: Registry, memory: Memory, folders: AdapterFolders) -> None:
        self._registry = registry
        self._memory = memory
        self._folders = folders

    async def list(self) -> Listing:
        """All adapters, as of one instant, and what could be one."""
        base = self._registry.base
        available = await self.available()
        resident_bytes = await self._memory.bytes_taken()
        entries = self._registry.entries
        by_now = {entry.id for entry in entries}
        await self.look_for_checkpoints(entries)
        checkpoints = await asyncio.to_thread(self._folders.trainings, base)
        available = [name for name in available if name not in by_now]
        return Listing(entries, resident_bytes, available, checkpoints)

    async def available(self) -> Sequence[str]:
        """The ids of folders directly under the root that look like adapters and are not registered."""
        loaded = {entry.id for entry in self._registry.entries}
        return await asyncio.to_thread(self._folders.available, self._registry.base, loaded)

    async def look_for_checkpoints(self, entries: Sequence[Entry]) -> None:
        """See which checkpoints lie in the folders of `entries` now."""
        sources = [(entry, entry.current.source) for entry in entries]

        def look() -> None:
            for entry, source in sources:
                if isinstance(source, AdapterFolder) and source.weights_file is None:
                    entry.checkpoints = self._folders.steps(source)
                else:
                    entry.checkpoints = ()

        await asyncio.to_thread(look)

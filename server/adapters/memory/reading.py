"""Reads what is to come into memory, a few at a time: folders, private copies, what is made.

Runs on the event loop; the work itself on threads of its own (`loading`), beside the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapters_core.bank import PreparedAdapter
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError

from ..errors import LifeCycleError
from ..folder import AdapterFolder, AdapterFolders
from ..keeping import Keeper
from ..looks import unchanged_seconds
from ..source import Source
from ..versions import Version
from .loading import prepare_again, prepare_folder, prepare_made
from .memory import Memory

__all__ = ["MAX_LOADS", "Reader"]

MAX_LOADS = 2
"""Loads that read and lay out at one time: one computes while another waits for the disk. What they hold
lies outside the budget, so more would take more memory, and on few cores would not be sooner."""


class Reader:
    """Reads for the bank of `memory`; `turns` is held from the reading until what was read is in the bank.

    A folder in a watched root has settled when nobody has written it for `settle_seconds`; None: none is
    watched.
    """

    def __init__(
        self, memory: Memory, folders: AdapterFolders, keeper: Keeper, settle_seconds: float | None
    ) -> None:
        self.turns = asyncio.Semaphore(MAX_LOADS)
        self._memory = memory
        self._folders = folders
        self._keeper = keeper
        self._settle_seconds = settle_seconds

    async def folder(self, folder: AdapterFolder) -> PreparedAdapter:
        """What a folder holds now. Raises as `prepare_folder`."""
        return await prepare_folder(folder, await self._memory.bank(), self._limit_bytes)

    async def made(self, make: Callable[[], AdapterContainer]) -> PreparedAdapter:
        """What `make` makes on a thread of its own. Raises as `prepare_made`."""
        return await prepare_made(make, await self._memory.bank(), self._limit_bytes)

    async def again(self, version: Version) -> tuple[Source, PreparedAdapter]:
        """What the copy of a version holds, or its folder if there is no copy, and where that lies.

        Raises: as `Keeper.read`, or as `prepare_again`.
        """
        if version.kept:
            return version.source, await self._keeper.read(version)
        bank = await self._memory.bank()
        return await prepare_again(self._folders, version.folder, bank, self._limit_bytes)

    async def keep(self, version: Version, beside: Version | None = None) -> None:
        """Copy `version` aside, out of memory or from its folder, if that can be. As `Keeper.keep`."""
        if await self._keeper.keep(version, beside=beside) or version.in_memory:
            return
        try:
            _, prepared = await self.again(version)
        except (InvalidAdapterError, LifeCycleError):
            return  # its folder is what replaces it, or has gone
        if prepared.resident.digest == version.resident.digest:
            await self._keeper.keep(version, prepared, beside)

    async def has_settled(self, folder: AdapterFolder) -> bool:
        """Whether what a folder holds may be served without a call: nothing that is being written is."""
        if self._settle_seconds is None:
            return True
        return await asyncio.to_thread(unchanged_seconds, folder) >= self._settle_seconds

    @property
    def _limit_bytes(self) -> int:
        return self._memory.residency.limit_bytes

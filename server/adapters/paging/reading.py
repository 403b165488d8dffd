"""Reads what is to come into memory, one at a time: folders, private copies, what is made.

Runs on the event loop; the work itself on a thread of its own (`loading`), beside the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import structlog

from adapters_core.bank import PreparedAdapter
from adapters_core.errors import AdapterError
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.mixed.residents import ResidentAdapter

from ..aside import Aside
from ..errors import AdapterChangingError, LifeCycleError, VersionGoneError, VersionUnreadableError
from ..folder import AdapterFolder, AdapterFolders
from ..keeping.keeper import Keeper
from ..looks import Rest, look_at
from ..memory.loading import check_made, prepare_again, prepare_folder, refuse_too_large
from ..memory.memory import Memory
from ..versions import Version
from .pace import ReadingPace

__all__ = ["MAX_LOADS", "Reader"]

_log = structlog.get_logger(__name__)

MAX_LOADS = 8
"""Loads under way at one time. What they hold lies outside the budget, so more would take more memory; so
many come into the bank in one gap between two steps, and their requests' prompts are read together."""


class Reader:
    """Reads for the bank of `memory`; `turns` is held from the reading until what was read is in the bank.

    A folder in a watched root has settled when nobody has written it for `settle_seconds`; None: none is
    watched.
    """

    def __init__(
        self,
        aside: Aside,
        memory: Memory,
        folders: AdapterFolders,
        keeper: Keeper,
        settle_seconds: float | None,
        pace: ReadingPace,
    ) -> None:
        self.turns = asyncio.Semaphore(MAX_LOADS)
        self._pace = pace
        self._aside = aside
        self._memory = memory
        self._folders = folders
        self._keeper = keeper
        self._settle_seconds = settle_seconds
        self._rest = Rest()

    async def folder(self, folder: AdapterFolder) -> PreparedAdapter:
        """What a folder holds now. Raises as `prepare_folder`."""
        async with self._pace.turn():
            return await prepare_folder(self._aside, folder, await self._memory.bank(), self._limit_bytes)

    async def refuse_too_large(self, folder: AdapterFolder) -> None:
        """Raises AdapterMemoryError if what a folder holds can never fit; reads headers alone."""
        await refuse_too_large(folder, await self._memory.bank(), self._limit_bytes)

    async def made(self, name: str, weights: Mapping[str, ModuleWeights]) -> ResidentAdapter:
        """What an adapter of modules called `name` will be in memory. Raises as `check_made`."""
        async with self._pace.turn():
            bank = await self._memory.bank()
            return await check_made(self._aside, name, weights, bank, self._limit_bytes)

    async def copy(self, version: Version) -> PreparedAdapter:
        """What was loaded, from a version's private copy, else from its folder. Raises as `Keeper.read`."""
        try:
            return await self._read_copy(version)
        except (VersionGoneError, VersionUnreadableError) as error:
            if isinstance(version.source, AdapterFolder):
                with suppress(AdapterError, LifeCycleError, OSError):
                    prepared = await self._prepare_again(version.source)
                    if prepared.resident.digest == version.resident.digest:
                        _log.warning("adapter_read_from_folder", reason=str(error))
                        return prepared
            raise

    async def again(self, adapter_id: str, version: Version, folder: AdapterFolder) -> PreparedAdapter:
        """What the folder of a version holds, if that can be served; else what was loaded from it.

        Raises:
            AdapterChangingError: it is being written, and there is no copy.
            InvalidAdapterError, AdapterNotFoundError, PathNotAllowedError, AdapterMemoryError: of the folder,
                and there is no copy.
            VersionGoneError, VersionUnreadableError: of the copy.
            OSError: the system gives no more of something, and there is no copy.
        """
        try:
            return await self._from_folder(adapter_id, version, folder)
        except (AdapterError, LifeCycleError, OSError) as error:
            if not version.kept:
                raise
            _log.warning("adapter_read_from_copy", adapter=adapter_id, reason=str(error))
        return await self._read_copy(version)

    async def _from_folder(self, adapter_id: str, version: Version, folder: AdapterFolder) -> PreparedAdapter:
        try:
            prepared = await self._prepare_again(folder)
            if prepared.resident.digest == version.resident.digest:
                return prepared
            if await self.has_settled(folder):
                self._memory.residency.require_possible(prepared.resident.size_bytes, version)
                return prepared
        except AdapterError:
            if await self.has_settled(folder):
                raise
        raise AdapterChangingError(adapter_id)

    async def has_settled(self, folder: AdapterFolder) -> bool:
        """Whether what a folder holds may be served without a call: nothing that is being written is."""
        if self._settle_seconds is None:
            return True
        look = await asyncio.to_thread(look_at, folder)
        return self._rest.seconds(folder, look) >= self._settle_seconds

    async def note_whole(self, folder: AdapterFolder) -> None:
        """What `folder` holds has settled: it got its name when all was in it."""
        self._rest.note_whole(folder, await asyncio.to_thread(look_at, folder))

    async def _prepare_again(self, folder: AdapterFolder) -> PreparedAdapter:
        async with self._pace.turn():
            bank = await self._memory.bank()
            return await prepare_again(self._aside, self._folders, folder, bank, self._limit_bytes)

    async def _read_copy(self, version: Version) -> PreparedAdapter:
        async with self._pace.turn():
            return await self._keeper.read(version, self._aside)

    @property
    def _limit_bytes(self) -> int:
        return self._memory.residency.limit_bytes

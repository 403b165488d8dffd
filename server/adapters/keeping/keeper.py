"""Private copies of versions, so many bytes at most: what is copied when, and what goes first.

What a folder holds is copied before it is read, so that the very files that were loaded are there when the
folder holds others. What is made has a copy alone. Of the rest, what is about to be replaced is copied out of
the bank. The copies lie on disk, for memory is what adapters compete for. The first to go are those of what
folders still hold, as far as anybody knows; then those that only a rollback would need; the oldest first.
Runs on the event loop; reads and writes on threads of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar

import structlog

from adapters_core.bank import PreparedAdapter
from adapters_core.errors import AdapterError, InvalidAdapterError
from adapters_core.layers.module_weights import ModuleWeights

from ..aside import run_aside
from ..copies import Copy, FilesCopy, ModulesCopy, RowsCopy, files_bytes
from ..errors import VersionGoneError
from ..folder import AdapterFolder
from ..memory.memory import Memory
from ..registry import Registry
from ..source import read_folder
from ..versions import Entry, Version
from .private import PrivateFolder

__all__ = ["Keeper"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T", bound=Copy)


class Keeper:
    """The copies of one registry's versions, in `folder`, `limit_bytes` at most."""

    def __init__(self, memory: Memory, registry: Registry, folder: PrivateFolder, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes_held = 0
        """Bytes of all copies."""
        self._memory = memory
        self._registry = registry
        self._folder = folder
        self._root: Path | None = None
        self._kept: dict[Version, None] = {}  # oldest first
        self._numbers = count()
        self._writing = asyncio.Lock()

    async def copy_files(self, folder: AdapterFolder, beside: Version | None = None) -> FilesCopy | None:
        """A copy of what `folder` holds now, to be adopted or discarded; None if that cannot be.

        For it, no copy is given up that a rollback needs, nor that of `beside`.
        """
        async with self._writing:
            return await self._copy_files(folder, {beside}, may_cost_rollbacks=False)

    def adopt(self, version: Version, copy: Copy | None) -> None:
        """`copy` is that of `version` from now on."""
        if copy is not None:
            version.copy = copy
            self._kept[version] = None

    def discard(self, copy: Copy | None) -> None:
        """Nothing comes of a copy that is no version's."""
        if copy is not None:
            self.bytes_held -= copy.size_bytes
            copy.remove()

    async def keep(self, version: Version, beside: Version | None = None) -> bool:
        """See to it that there is a copy of `version`; False if that cannot be.

        It is of the files in its folder, if that still holds what was loaded, else of what the bank has. That
        of `beside` is not given up for it.
        """
        if version.kept:
            return True
        async with self._writing:
            if not version.kept:
                copy = await self._copy_original(version, {beside, version})
                self.adopt(version, copy or await self._copy_rows(version, {beside, version}))
            return version.kept

    async def keep_current(self, entry: Entry | None) -> None:
        """Keep what is current at the instant at which this returns, as far as that can be."""
        kept = None
        while entry is not None and kept is not entry.current:
            kept = entry.current
            await self.keep(kept)

    async def keep_made(self, version: Version, weights: Mapping[str, ModuleWeights]) -> bool:
        """Copy `weights`, evaluated, which `version` was made of; False if that cannot be."""
        async with self._writing:
            if not self._make_room(version.size_bytes, {version}):
                return False
            self.adopt(version, await self._write(lambda place: run_aside(ModulesCopy.of, weights, place)))
            return version.kept

    async def read(self, version: Version) -> PreparedAdapter:
        """What the copy of `version` holds, under the identity that rows know it by.

        Raises:
            VersionGoneError: it cannot be read, or is not what was kept; there is no copy any more.
        """
        prepared, bank = None, await self._memory.bank()
        if (copy := version.copy) is not None:
            with suppress(OSError, RuntimeError, ValueError, AdapterError):
                prepared = await run_aside(copy.prepare, bank)
        if prepared is None or prepared.resident.digest != version.resident.digest:
            self.drop(version)
            raise VersionGoneError(version.resident.digest)
        return replace(prepared, resident=version.resident)

    def drop(self, version: Version) -> None:
        """Have no copy of `version` any more; no rollback leads to it then."""
        copy, version.copy = version.copy, None
        self._kept.pop(version, None)
        self._registry.forget_previous(version)
        self.discard(copy)

    async def _copy_files(
        self, folder: AdapterFolder, beside: set[Version | None], may_cost_rollbacks: bool
    ) -> FilesCopy | None:
        try:
            size_bytes = await asyncio.to_thread(files_bytes, folder)
        except OSError:
            return None  # reading it will say what is wrong
        if not self._make_room(size_bytes, beside, may_cost_rollbacks):
            return None
        return await self._write(lambda place: asyncio.to_thread(FilesCopy.of, folder, place))

    async def _copy_original(self, version: Version, beside: set[Version | None]) -> FilesCopy | None:
        """The files of the folder that `version` came from, if they are what was loaded."""
        source, digest = version.source, version.resident.digest
        if not self.limit_bytes or not isinstance(source, AdapterFolder):
            return None
        if not await run_aside(_holds, source, digest):
            return None  # before any other copy is given up for it
        copy = await self._copy_files(source, beside, may_cost_rollbacks=True)
        if copy is None or await run_aside(_holds, copy.folder, digest):
            return copy
        self.discard(copy)
        return None

    async def _copy_rows(self, version: Version, beside: set[Version | None]) -> RowsCopy | None:
        if not version.in_memory or not self._make_room(version.size_bytes, beside):
            return None
        prepared = await self._memory.copy_of(version)
        if prepared is None:
            return None
        return await self._write(lambda place: run_aside(RowsCopy.of, prepared, place))

    async def _write(self, write: Callable[[Path], Awaitable[_T]]) -> _T | None:
        """The copy that `write` makes at a new place; None, with a line in the log, if it cannot."""
        try:
            if self._root is None:
                self._root = await asyncio.to_thread(self._folder.path)
            copy = await write(self._root / str(next(self._numbers)))
        except (OSError, RuntimeError) as error:  # MLX's own errors of writing are RuntimeErrors
            _log.warning("version_not_kept", reason=str(error))
            return None
        self.bytes_held += copy.size_bytes
        return copy

    def _make_room(
        self, size_bytes: int, beside: set[Version | None], may_cost_rollbacks: bool = True
    ) -> bool:
        """Drop old copies that are needed less, until so many bytes more are allowed."""
        if size_bytes > self.limit_bytes:
            return False
        if self.bytes_held + size_bytes > self.limit_bytes:
            for version in self._spare(may_cost_rollbacks):
                if self.bytes_held + size_bytes <= self.limit_bytes:
                    break
                if version not in beside and not version.loading:
                    self.drop(version)
        return self.bytes_held + size_bytes <= self.limit_bytes

    def _spare(self, with_rollbacks: bool) -> Iterator[Version]:
        """What folders hold too, as far as is known; then what only a rollback would need. Oldest first."""
        entries = self._registry.entries
        here = {entry.current for entry in entries if entry.current is entry.newest}
        previous = {entry.previous for entry in entries}
        kept = list(self._kept)
        yield from (one for one in kept if one in here and isinstance(one.source, AdapterFolder))
        if with_rollbacks:
            yield from (one for one in kept if one in previous)


def _holds(folder: AdapterFolder, digest: str) -> bool:
    try:
        return read_folder(folder).digest == digest
    except (OSError, InvalidAdapterError):
        return False

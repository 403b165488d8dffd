"""Private copies of versions, so many bytes at most: what is copied when, and what goes first.

What a folder holds is copied before it is read, if there is free room, so that the very files that were
loaded are there when the folder holds others. What is made has a copy alone. Of the rest, what is about to be
replaced is copied, at the latest out of the bank. The copies lie on disk, for memory is what adapters compete
for. The first to go are those of what folders still hold, as far as anybody knows; then those that only a
rollback would need; the oldest first. The books change at one instant each time, before what is copied is
written and before what goes is removed. Runs on the event loop; works on files on other threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from adapters_core.bank import PreparedAdapter
from adapters_core.errors import AdapterError, FolderChangedError, InvalidAdapterError
from adapters_core.layers.module_weights import ModuleWeights

from ..aside import Aside
from ..copies import Copy, FilesCopy, ModulesCopy, RowsCopy, files_bytes
from ..errors import LifeCycleError, VersionGoneError, VersionUnreadableError
from ..folder import AdapterFolder
from ..memory.memory import Memory
from ..registry import Registry
from ..source import read_folder
from ..tasks import Tasks
from ..versions import Entry, Version
from .private import PrivateFolder

__all__ = ["Keeper"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T", bound=Copy)


class Keeper:
    """The copies of one registry's versions, in `folder`, `limit_bytes` at most."""

    def __init__(
        self,
        aside: Aside,
        memory: Memory,
        registry: Registry,
        folder: PrivateFolder,
        tasks: Tasks,
        limit_bytes: int,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.bytes_held = 0
        """Bytes of all copies, and of those that are being written."""
        self._aside = aside
        self._memory = memory
        self._registry = registry
        self._folder = folder
        self._tasks = tasks
        self._root: Path | None = None
        self._opening = asyncio.Lock()
        self._kept: dict[Version, None] = {}  # oldest first
        self._numbers = count()
        self._keeping: WeakValueDictionary[Version, asyncio.Lock] = WeakValueDictionary()
        self._leaving: list[Copy] = []
        self._removal: asyncio.Task[None] | None = None

    async def copy_files(self, folder: AdapterFolder) -> FilesCopy | None:
        """A copy of what `folder` holds now, to be adopted or discarded; None if there is no free room."""
        size_bytes = await _size_of(folder)
        if not size_bytes or self.bytes_held + size_bytes > self.limit_bytes:
            return None
        return await self._write(size_bytes, lambda place: asyncio.to_thread(FilesCopy.of, folder, place))

    def adopt(self, version: Version, copy: Copy | None) -> None:
        """`copy` is that of `version` from now on."""
        if copy is not None:
            version.copy = copy
            self._kept[version] = None

    def discard(self, copy: Copy | None) -> None:
        """Nothing comes of a copy that is no version's."""
        if copy is not None:
            self.bytes_held -= copy.size_bytes
            self._leaving.append(copy)
            if self._removal is None:
                self._removal = self._tasks.start(self._remove())

    async def keep(
        self, version: Version, beside: Version | None = None, *, may_cost_rollbacks: bool = True
    ) -> bool:
        """See to it that there is a copy of `version`; False if that cannot be.

        It is of the files in its folder, if that still holds what was loaded, else of what the bank has. That
        of `beside` is not given up for it, and none that a rollback needs unless it `may_cost_rollbacks`.
        """
        if version.kept:
            return True
        async with self._keeping.setdefault(version, asyncio.Lock()):
            if not version.kept:

                def make_room(size_bytes: int) -> bool:
                    return self._make_room(size_bytes, {beside, version}, may_cost_rollbacks)

                copy = await self._copy_original(version, make_room)
                self.adopt(version, copy or await self._copy_rows(version, make_room))
            return version.kept

    async def keep_current(self, entry: Entry | None, beside: Version | None = None) -> None:
        """Keep, as `keep` does, what is current at the instant at which this returns, as far as can be."""
        kept = None
        while entry is not None and self._registry.find(entry.id) is entry and kept is not entry.current:
            kept = entry.current
            await self.keep(kept, beside)

    async def keep_made(
        self,
        version: Version,
        weights: Mapping[str, ModuleWeights],
        beside: Version | None = None,
        *,
        may_cost_rollbacks: bool = True,
    ) -> bool:
        """Copy `weights`, evaluated, which `version` was made of; False if that cannot be."""
        size_bytes = ModulesCopy.most_bytes(weights)
        if not self._make_room(size_bytes, {beside, version}, may_cost_rollbacks):
            return False
        write = ModulesCopy.of
        copy = await self._write(size_bytes, lambda place: self._aside.run(write, weights, place))
        self.adopt(version, copy)
        return version.kept

    async def read(self, version: Version, aside: Aside) -> PreparedAdapter:
        """What the copy of `version` holds, under the identity that rows know it by; reads on `aside`.

        Raises:
            VersionGoneError: it is not what was kept, and is given up; there is no copy any more.
            VersionUnreadableError: it cannot be read now, and stays.
        """
        prepared, bank, copy = None, await self._memory.bank(), version.copy
        if copy is not None:
            try:
                prepared = await aside.run(copy.prepare, bank)
            except (FileNotFoundError, ValueError, InvalidAdapterError) as error:
                if isinstance(error.__cause__, OSError):
                    raise _unreadable(version, error) from error
            except (OSError, RuntimeError, MemoryError, FolderChangedError) as error:
                raise _unreadable(version, error) from error
        if prepared is None or prepared.resident.digest != version.resident.digest:
            if version.copy is copy:
                self.drop(version)
            raise VersionGoneError(version.resident.digest)
        return replace(prepared, resident=version.resident)

    def drop(self, version: Version) -> None:
        """Have no copy of `version` any more; no rollback leads to it then."""
        copy, version.copy = version.copy, None
        self._kept.pop(version, None)
        self._registry.forget_previous(version)
        self.discard(copy)

    async def _copy_original(self, version: Version, make_room: Callable[[int], bool]) -> FilesCopy | None:
        """The files of the folder that `version` came from, if they are what was loaded."""
        source, digest = version.source, version.resident.digest
        if not isinstance(source, AdapterFolder):
            return None
        size_bytes = await _size_of(source)
        if not size_bytes or size_bytes > self.limit_bytes:
            return None
        # Read first: no other copy is given up for what does not hold.
        if not await self._aside.run(_holds, source, digest) or not make_room(size_bytes):
            return None
        copy = await self._write(size_bytes, lambda place: asyncio.to_thread(FilesCopy.of, source, place))
        if copy is None or await self._aside.run(_holds, copy.folder, digest):
            return copy
        self.discard(copy)
        return None

    async def _copy_rows(self, version: Version, make_room: Callable[[int], bool]) -> RowsCopy | None:
        if not version.in_memory or version.size_bytes > self.limit_bytes:
            return None
        prepared = await self._memory.copy_of(version)
        if prepared is None or not make_room(size_bytes := RowsCopy.most_bytes(prepared)):
            return None
        return await self._write(size_bytes, lambda place: self._aside.run(RowsCopy.of, prepared, place))

    async def _write(self, size_bytes: int, write: Callable[[Path], Awaitable[_T]]) -> _T | None:
        """The copy that `write` makes at a new place, of `size_bytes` at most, for which there is room.

        None, with a line in the log, if it cannot; None as well if it is larger, for then somebody was
        writing what was copied.
        """
        self.bytes_held += size_bytes
        copy = None
        try:
            if self._removal is not None:
                await asyncio.wait({self._removal})  # so that the disk has the room that the books say
            copy = await write(await self._open() / str(next(self._numbers)))
        # MLX's own errors of writing are RuntimeErrors; what is copied may have gone or changed.
        except (OSError, RuntimeError, AdapterError, LifeCycleError) as error:
            _log.warning("version_not_kept", reason=str(error))
        finally:
            self.bytes_held += (0 if copy is None else copy.size_bytes) - size_bytes
        if copy is not None and copy.size_bytes > size_bytes:
            self.discard(copy)
            return None
        return copy

    async def _open(self) -> Path:
        """The folder of the copies. Raises OSError."""
        async with self._opening:
            root, before = await asyncio.to_thread(self._folder.path), self._root
            self._root = root
            if before not in (None, root):  # it was removed, with all that was in it
                for version in list(self._kept):
                    self.drop(version)
            return root

    async def _remove(self) -> None:
        """Remove what was discarded, until there is no more."""
        while self._leaving:
            leaving, self._leaving = self._leaving, []
            await asyncio.to_thread(_remove_all, leaving)
        self._removal = None

    def _make_room(
        self, size_bytes: int, beside: set[Version | None], may_cost_rollbacks: bool = True
    ) -> bool:
        """Drop old copies that are needed less, until so many bytes more are allowed; none if that fails."""
        lacking_bytes = self.bytes_held + size_bytes - self.limit_bytes
        going: list[Version] = []
        for version in self._spare(may_cost_rollbacks) if size_bytes <= self.limit_bytes else ():
            if lacking_bytes <= 0:
                break
            if version.copy is not None and version not in beside and not version.loading:
                going.append(version)
                lacking_bytes -= version.copy.size_bytes
        if lacking_bytes > 0:
            return False
        for version in going:
            self.drop(version)
        return True

    def _spare(self, with_rollbacks: bool) -> Iterator[Version]:
        """What folders hold too, as far as is known; then what only a rollback would need. Oldest first."""
        entries = self._registry.entries
        here = {entry.current for entry in entries if entry.current is entry.newest}
        previous = {entry.previous for entry in entries}
        kept = list(self._kept)
        yield from (one for one in kept if one in here and isinstance(one.source, AdapterFolder))
        if with_rollbacks:
            yield from (one for one in kept if one in previous)


def _unreadable(version: Version, error: Exception) -> VersionUnreadableError:
    _log.warning("version_not_readable", digest=version.resident.digest, reason=str(error))
    return VersionUnreadableError(version.resident.digest)


async def _size_of(folder: AdapterFolder) -> int | None:
    """Bytes of the files in `folder`; None if that cannot be told: reading it will say what is wrong."""
    try:
        return await asyncio.to_thread(files_bytes, folder)
    except (OSError, AdapterError, LifeCycleError):
        return None


def _holds(folder: AdapterFolder, digest: str) -> bool:
    try:
        return read_folder(folder).digest == digest
    except (OSError, AdapterError, LifeCycleError):
        return False


def _remove_all(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy.remove()

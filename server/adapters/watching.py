"""Watches the adapters root: what is new there becomes an adapter, what has changed its next version.

What counts is what a scan finds. Scans come regularly, and sooner when the system tells of a change; what
it does not tell, as on network drives, is found all the same. A folder is read once it has looked the same
for a while, must look the same after it was read, and is not touched again until it looks different. One load
at a time. What goes wrong is logged; the watch goes on. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from watchfiles import awatch

from adapters_core.bank import PreparedAdapter
from adapters_core.errors import FolderChangedError, InvalidAdapterError, OutsideRootError

from .errors import LifeCycleError
from .folder import AdapterFolder, AdapterFolders
from .looks import Look, look_around, look_at
from .paging.placing import Accept
from .registry import Registry

__all__ = ["Watcher"]

_log = structlog.get_logger(__name__)

PAUSE_SECONDS = 30.0
"""Until a folder that could not be loaded for want of memory, or the like, is tried again."""

Load = Callable[[str, AdapterFolder, Accept], Awaitable[None]]
"""Loads what is in a folder as the first or the next version of an id, unless the id was unloaded."""


class _NothingNewError(Exception):
    """The folder holds what was loaded last."""


class _StillChangingError(Exception):
    """Somebody wrote while it was read."""


@dataclass(slots=True)
class _Seen:
    """How a folder looks since when; `is_done` once that was loaded or refused; not tried again before."""

    look: Look
    since: float
    is_done: bool = False
    not_before: float = 0.0


class Watcher:
    """A watch of `root`; `load` is called for what has been the same for `settle_seconds`.

    From one scan to the next, `rescan_seconds` pass at most.
    """

    def __init__(
        self,
        root: Path,
        folders: AdapterFolders,
        registry: Registry,
        load: Load,
        settle_seconds: float,
        rescan_seconds: float,
    ) -> None:
        self._root = root
        self._folders = folders
        self._registry = registry
        self._load = load
        self._settle_seconds = settle_seconds
        self._rescan_seconds = rescan_seconds
        self._seen: dict[str, _Seen] = {}
        self._woken = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """Watch until `close`."""
        listening = asyncio.create_task(self._listen())
        try:
            while not self._closed.is_set():
                wait_seconds = self._rescan_seconds
                try:
                    wait_seconds = await self._scan()
                except Exception:
                    _log.exception("adapters_root_not_scanned")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), wait_seconds)
                self._woken.clear()
        finally:
            self._closed.set()
            await listening

    def close(self) -> None:
        """End the watch; a load that is under way goes on to its end."""
        self._closed.set()
        self._woken.set()

    async def _listen(self) -> None:
        """Wake the scan when the system tells of changes; without that, scans come regularly."""
        while not self._closed.is_set():
            try:
                async for _ in awatch(self._root, watch_filter=None, stop_event=self._closed):
                    self._woken.set()
            except Exception as error:  # the root is not there, or the system has no watch to give
                _log.warning(
                    "adapters_root_not_watched", reason=str(error), rescan_seconds=self._rescan_seconds
                )
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), PAUSE_SECONDS)

    async def _scan(self) -> float:
        """Look around, and load what has settled; returns the seconds until the next look is due."""
        newest = {entry.id: entry.newest.source for entry in self._registry.entries}
        loaded = {name: source for name, source in newest.items() if isinstance(source, AdapterFolder)}
        made = newest.keys() - loaded.keys()
        found = await asyncio.to_thread(look_around, self._folders, self._registry.base, loaded)
        for adapter_id in self._seen.keys() - found.keys():
            del self._seen[adapter_id]
            if adapter_id in loaded:
                _log.warning("adapter_folder_gone", adapter=adapter_id)
        wait_seconds = self._rescan_seconds
        for adapter_id, (folder, look) in found.items():
            if self._closed.is_set():
                break
            if adapter_id not in made and adapter_id not in self._registry.unloaded:
                wait_seconds = min(wait_seconds, await self._consider(adapter_id, folder, look))
        return wait_seconds

    async def _consider(self, adapter_id: str, folder: AdapterFolder, look: Look) -> float:
        now = time.monotonic()
        seen = self._seen.get(adapter_id)
        if seen is None or seen.look != look:
            self._seen[adapter_id] = _Seen(look, now)
            return self._settle_seconds
        if seen.is_done:
            return self._rescan_seconds
        settled_seconds = max(seen.since + self._settle_seconds, seen.not_before) - now
        if settled_seconds > 0:
            return settled_seconds
        if self._registry.fused is not None:
            return self._rescan_seconds
        await self._try(adapter_id, folder, seen)
        return self._rescan_seconds if seen.is_done else self._settle_seconds

    async def _try(self, adapter_id: str, folder: AdapterFolder, seen: _Seen) -> None:
        async def accept(prepared: PreparedAdapter) -> None:
            entry = self._registry.find(adapter_id)
            if entry is not None and prepared.resident.digest == entry.newest.resident.digest:
                raise _NothingNewError
            if await asyncio.to_thread(look_at, folder) != seen.look:
                raise _StillChangingError

        seen.is_done = True
        try:
            await self._load(adapter_id, folder, accept)
        except _NothingNewError:
            pass
        except (_StillChangingError, FolderChangedError):
            seen.is_done = False
        except InvalidAdapterError as error:
            if await asyncio.to_thread(look_at, folder) == seen.look:
                _log.warning("adapter_folder_broken", adapter=adapter_id, problems=error.told)
        except (LifeCycleError, OutsideRootError) as error:  # no room for it, or an adapter was just fused
            _log.warning("adapter_folder_not_loaded", adapter=adapter_id, reason=str(error))
            seen.is_done, seen.not_before = False, time.monotonic() + PAUSE_SECONDS
        except Exception:
            _log.exception("adapter_folder_not_loaded", adapter=adapter_id)

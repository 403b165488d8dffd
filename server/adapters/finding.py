"""Loads what no call asked for: folders that requests name, and what the watch of the root finds.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio

from adapters_core.bank import PreparedAdapter
from adapters_core.errors import InvalidAdapterError

from .errors import AdapterMemoryError, UnknownCheckpointError, quoted
from .folder import AdapterFolder, AdapterFolders
from .gate import Gate
from .names import checkpoint_of
from .paging.placing import Accept, Placer, Wish
from .registry import Registry
from .reports import Journal
from .tasks import Tasks
from .versions import Version

__all__ = ["Finder"]


class _BeingWrittenError(Exception):
    """Somebody has written what a request named, while it waited or was read."""


class Finder:
    """What a call unloaded is not found again, until a call loads it."""

    def __init__(
        self,
        registry: Registry,
        folders: AdapterFolders,
        tasks: Tasks,
        gate: Gate,
        placer: Placer,
        journal: Journal,
    ) -> None:
        self._registry = registry
        self._folders = folders
        self._tasks = tasks
        self._gate = gate
        self._placer = placer
        self._journal = journal
        self._demanded: dict[str, asyncio.Task[None]] = {}

    async def demand(self, adapter_id: str) -> None:
        """Load the adapter if it may be; those who want it at the same time wait for one load.

        Without room at once it is registered, and the requests that name it wait for room.

        Raises:
            InvalidAdapterError, AdapterMemoryError, BaseIsFusedError
        """
        task = self._demanded.get(adapter_id)
        if task is None:
            task = self._demanded[adapter_id] = self._tasks.start(self._demand(adapter_id))
            task.add_done_callback(lambda _: self._demanded.pop(adapter_id, None))
        await asyncio.shield(task)

    async def could_load(self, adapter_id: str) -> bool:
        """Whether `demand` would find something to load.

        Raises:
            BaseIsFusedError: it would, but for what is fused.
        """
        folder = await asyncio.to_thread(self._folder_of, adapter_id)
        if folder is None or not await self._placer.reader.has_settled(folder):
            return False
        self._refuse_if_fused(adapter_id)
        return True

    async def refuse_if_training(self, adapter_id: str, param: str) -> None:
        """Say which checkpoints there are, of what was not found; `param` is where it was named.

        Raises:
            UnknownCheckpointError: there are some.
        """
        checkpoint = checkpoint_of(adapter_id)
        trained = adapter_id if checkpoint is None else checkpoint.id
        parent = self._trained_into(trained)
        steps = await asyncio.to_thread(self._folders.steps_of, trained, parent)
        is_there = checkpoint is not None and checkpoint.step in steps  # and is being written
        if steps and not is_there:
            raise UnknownCheckpointError(adapter_id, trained, steps, param)

    async def load(self, adapter_id: str, folder: AdapterFolder, accept: Accept) -> None:
        """Load what is in a watched folder, as the first or the next version of an id.

        Raises:
            InvalidAdapterError, AdapterMemoryError, BaseIsFusedError, and what `accept` raises.
        """
        async with self._tasks.lock(adapter_id):
            entry = self._registry.find(adapter_id)
            wish = Wish(adapter_id, folder, entry, accept)
            if entry is not None and entry.current.in_memory:
                self._publish(wish, await self._placer.load_in_turn(wish))
                return
            async with self._gate.shared():
                self._refuse_if_fused(adapter_id)
                if adapter_id not in self._registry.unloaded:
                    # Nobody waits for it, so nothing leaves memory for it.
                    self._publish(wish, await self._placer.load(wish, may_evict=False))

    async def _demand(self, adapter_id: str) -> None:
        has_settled = self._placer.reader.has_settled
        folder = await asyncio.to_thread(self._folder_of, adapter_id)
        if folder is None or not await has_settled(folder):
            return

        async def accept(_: PreparedAdapter) -> None:
            if not await has_settled(folder):
                raise _BeingWrittenError

        async with self._tasks.lock(adapter_id), self._gate.shared():
            self._refuse_if_fused(adapter_id)
            if self._registry.find(adapter_id) is None and not self._registry.was_unloaded(adapter_id):
                wish = Wish(adapter_id, folder, accept=accept)
                try:
                    self._publish(wish, await self._placer.load(wish))
                except _BeingWrittenError:
                    return
                except (InvalidAdapterError, AdapterMemoryError):
                    if await has_settled(folder):
                        raise

    def _folder_of(self, adapter_id: str) -> AdapterFolder | None:
        checkpoint = checkpoint_of(adapter_id)
        if checkpoint is None:
            return self._folders.on_demand(adapter_id)
        parent = self._trained_into(checkpoint.id)
        return self._folders.checkpoint(checkpoint.id, checkpoint.step, parent)

    def _trained_into(self, adapter_id: str) -> AdapterFolder | None:
        """The folder that an adapter was loaded from last."""
        trained = self._registry.find(adapter_id)
        source = None if trained is None else trained.newest.source
        return source if isinstance(source, AdapterFolder) else None

    def _publish(self, wish: Wish, version: Version) -> None:
        entry = self._registry.find(wish.adapter_id)
        if entry is not None and entry.newest.resident.digest == version.resident.digest:
            self._registry.retire(entry, version)  # a request was faster, which found the same
            return
        self._registry.publish(wish.adapter_id, version)
        self._journal.loaded(wish.adapter_id, version)

    def _refuse_if_fused(self, adapter_id: str) -> None:
        self._registry.refuse_if_fused(f"{quoted(adapter_id)} cannot be loaded")

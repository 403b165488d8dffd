"""Gives ids new versions, and old ones back, as calls ask for it. Runs on the event loop.

Changes of one id take turns, those of different ids do not wait for each other. On failure everything is as
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from adapters_core.errors import InvalidAdapterError
from adapters_core.layers.module_weights import ModuleWeights

from .errors import AdapterExistsError, quoted, some_of
from .folder import AdapterFolder, AdapterFolders
from .paging.placing import Placer, Wish
from .paging.returning import Returner
from .registry import Registry
from .reports import Journal
from .source import Made
from .tasks import Tasks
from .versions import Entry, Version

__all__ = ["Changes", "Loaded", "Wishes"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """`entry` has a new version; `created` says whether its id is new as well."""

    entry: Entry
    created: bool


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a call wants of a load besides its content; `pinned` None leaves it as it is."""

    pinned: bool | None = None
    activate: bool = False
    replace: bool = False


class Changes:
    """The changes of what ids mean."""

    def __init__(
        self,
        registry: Registry,
        folders: AdapterFolders,
        tasks: Tasks,
        placer: Placer,
        returner: Returner,
        journal: Journal,
    ) -> None:
        self._registry = registry
        self._folders = folders
        self._tasks = tasks
        self._placer = placer
        self._returner = returner
        self._journal = journal

    async def load(
        self, adapter_id: str, path: str | None, wishes: Wishes, scale: float | None = None
    ) -> Loaded:
        """Load what a folder holds. Raises as `AdapterService.load`."""
        async with self._tasks.lock(adapter_id):
            entry = self._replaceable(adapter_id, wishes)
            folder = await asyncio.to_thread(self._folders.find, adapter_id, path, scale)
            try:
                version = await self._placer.load_in_turn(Wish(adapter_id, folder, entry))
            except InvalidAdapterError as error:
                steps = await asyncio.to_thread(self._folders.steps, folder)
                raise _with_checkpoints(error, adapter_id, folder, steps) from error
            return self._publish(adapter_id, version, wishes, entry)

    async def load_made(
        self, adapter_id: str, made: Made, weights: Mapping[str, ModuleWeights], wishes: Wishes
    ) -> Loaded:
        """Load what was made. Raises as `AdapterService.load_made`."""
        async with self._tasks.lock(adapter_id):
            entry = self._replaceable(adapter_id, wishes)
            version = await self._returner.place_made(adapter_id, made, weights, entry)
            return self._publish(adapter_id, version, wishes, entry)

    async def roll_back(self, adapter_id: str) -> Entry:
        """Make the previous version the current one. Raises as `AdapterService.roll_back`."""
        async with self._tasks.lock(adapter_id):
            entry = self._registry.get(adapter_id)
            await self._returner.roll_back(entry)
            _log.info("adapter_rolled_back", adapter=adapter_id, version=entry.current.number)
            return entry

    def _replaceable(self, adapter_id: str, wishes: Wishes) -> Entry | None:
        """What is to be replaced, if there is anything."""
        self._registry.refuse_if_fused(f"{quoted(adapter_id)} cannot be loaded")
        entry = self._registry.find(adapter_id)
        if entry is not None and not wishes.replace:
            raise AdapterExistsError(adapter_id)
        return entry

    def _publish(self, adapter_id: str, version: Version, wishes: Wishes, before: Entry | None) -> Loaded:
        entry = self._registry.publish(adapter_id, version, wishes.pinned)
        self._journal.loaded(adapter_id, version)
        if wishes.activate:
            self._registry.activate(adapter_id)
        return Loaded(entry, created=before is None)


def _with_checkpoints(
    error: InvalidAdapterError, adapter_id: str, folder: AdapterFolder, steps: Sequence[int]
) -> InvalidAdapterError:
    """With a word on `steps`, if a training wrote them into a folder of which their names are."""
    if not steps or folder.shown != adapter_id:
        return error
    names = some_of([f"{adapter_id}@step-{step}" for step in reversed(steps)])
    more = f"the folder holds checkpoints, which have names of their own: {names}"
    return InvalidAdapterError(error.source, error.problems, [*error.causes, more])

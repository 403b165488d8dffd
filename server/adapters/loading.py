"""One version of an adapter: from its folder into the bank, and out of it.

Reading, checking and laying out run on a worker thread, so that neither the event loop nor the generation
waits for them; the bank changes on the generation thread. Knows no names.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import cast

from adapters_core.bank import AdapterBank, PreparedAdapter, ResidentAdapter
from adapters_core.container import AdapterContainer
from server.engine.container import ModelContainer, ModelContext

from .aside import run_aside
from .errors import AdapterMemoryError
from .folder import AdapterFolder
from .registry import Version

__all__ = ["load_version", "remove_residents"]


async def load_version(
    container: ModelContainer,
    folder: AdapterFolder,
    number: int,
    *,
    limit_bytes: int | None = None,
    leaving: Iterable[ResidentAdapter] = (),
) -> Version:
    """Read `folder`, check it against the resident model and put it into the bank.

    `limit_bytes` bounds what the adapters in the bank take, those in `leaving` not counted. If this raises,
    nothing has changed.

    Raises:
        InvalidAdapterError: everything that is wrong with the folder or does not fit the model.
        AdapterMemoryError: the limit would be exceeded.
    """
    started = time.perf_counter()
    bank = await container.perform(lambda context: context.bank)
    prepared = await run_aside(_prepare, folder, bank)
    left_out = frozenset(leaving)
    resident = await container.update(lambda context: _add(context, prepared, limit_bytes, left_out))
    return Version(number, resident, folder, load_seconds=time.perf_counter() - started)


async def remove_residents(container: ModelContainer, residents: Iterable[ResidentAdapter]) -> int:
    """Take adapters that no row uses out of the bank; returns the bytes that this freed there."""
    leaving = tuple(residents)
    return await container.update(lambda context: _remove(context, leaving))


def _prepare(folder: AdapterFolder, bank: AdapterBank) -> PreparedAdapter:
    return bank.prepare(AdapterContainer.from_directory(folder.path))


def _add(
    context: ModelContext,
    prepared: PreparedAdapter,
    limit_bytes: int | None,
    leaving: frozenset[ResidentAdapter],
) -> ResidentAdapter:
    if limit_bytes is not None:
        staying = sum(resident.size_bytes for resident in context.bank.residents - leaving)
        needed_bytes = staying + prepared.resident.size_bytes
        if needed_bytes > limit_bytes:
            raise AdapterMemoryError(needed_bytes, limit_bytes)
    return context.bank.add(prepared)


def _remove(context: ModelContext, leaving: tuple[ResidentAdapter, ...]) -> int:
    freed_bytes = sum(context.bank.remove(resident) for resident in leaving)
    staying = {resident.digest for resident in context.bank.residents}
    gone = {resident.digest for resident in leaving} - staying
    context.prompt_cache.drop(lambda key: _computed_with(key, gone))
    return freed_bytes


def _computed_with(key: Hashable, digests: set[str]) -> bool:
    """Whether a key of `ModelContext.cache_key` names one of these adapters."""
    _, _, terms = cast(tuple[str, str | None, tuple[tuple[str, float], ...]], key)
    return any(digest in digests for digest, _ in terms)

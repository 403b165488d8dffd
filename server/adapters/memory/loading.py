"""Adapters into the bank and out of it: what runs on a worker thread, and what on the generation thread.

Reading, checking and laying out run on a worker thread, so that neither the event loop nor the generation
waits for them; only the change of the bank takes a gap between two steps. Knows no names, and of the budget
its limit alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from adapters_core.bank import AdapterBank, PreparedAdapter
from adapters_core.container import AdapterContainer
from adapters_core.formats.reading import least_memory_bytes
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.mixed.residents import ResidentAdapter
from adapters_core.open_folder import OpenFolder
from server.engine.context import ModelContext

from ..aside import Aside
from ..errors import AdapterMemoryError
from ..folder import AdapterFolder, AdapterFolders
from .updates import BankUpdates

__all__ = [
    "Unfinished",
    "check_made",
    "exchange",
    "known_as",
    "prepare_again",
    "prepare_folder",
    "refuse_too_large",
    "remove_residents",
]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An exchange that failed with `error`, and what the bank holds at that instant."""

    error: Exception
    residents: frozenset[ResidentAdapter]


async def prepare_folder(
    aside: Aside, folder: AdapterFolder, bank: AdapterBank, limit_bytes: int
) -> PreparedAdapter:
    """Read `folder` and check it against the bank's model, in full; changes nothing.

    Raises:
        InvalidAdapterError: everything that is wrong with the folder or does not fit the model.
        AdapterMemoryError: it would take more than `limit_bytes`, so it was not read.
        AdapterNotFoundError, OutsideRootError, FolderChangedError: as `AdapterFolder.open`.
    """
    return await aside.run(_prepare, folder, bank, limit_bytes)


async def refuse_too_large(folder: AdapterFolder, bank: AdapterBank, limit_bytes: int) -> None:
    """Refuse what would take more than `limit_bytes`; reads headers.

    Raises:
        AdapterMemoryError: what `folder` holds would.
        AdapterNotFoundError, OutsideRootError, FolderChangedError: as `AdapterFolder.open`.
    """
    await asyncio.to_thread(_refuse_too_large, folder, bank, limit_bytes)


async def prepare_again(
    aside: Aside, folders: AdapterFolders, folder: AdapterFolder, bank: AdapterBank, limit_bytes: int
) -> PreparedAdapter:
    """As `prepare_folder`, for a folder that was found before and may lead elsewhere by now.

    Raises:
        AdapterNotFoundError, PathNotAllowedError: as `AdapterFolders.again`.
    """
    return await aside.run(_prepare_again, folders, folder, bank, limit_bytes)


async def check_made(
    aside: Aside,
    name: str,
    weights: Mapping[str, ModuleWeights],
    bank: AdapterBank,
    limit_bytes: int,
) -> ResidentAdapter:
    """What an adapter of `weights`, evaluated, will be in the bank; changes nothing.

    Raises:
        InvalidAdapterError: it does not fit the model.
        AdapterMemoryError: it would take more than `limit_bytes`.
    """
    return await aside.run(_check_made, name, weights, bank, limit_bytes)


def known_as(prepared: PreparedAdapter, resident: ResidentAdapter) -> PreparedAdapter:
    """The same weights under the identity that rows know them by; the content must be the same."""
    if prepared.resident.digest != resident.digest:
        raise ValueError(f"expected the content {resident.digest}, got {prepared.resident.digest}")
    return replace(prepared, resident=resident)


async def exchange(
    updates: BankUpdates, prepared: PreparedAdapter, leaving: Iterable[ResidentAdapter]
) -> Unfinished | None:
    """Take `leaving` out of the bank and put `prepared` in, in one step, so that slots are used again.

    Returns what became of it if it failed midway: the caller brings its books in line, and raises.
    """
    out = tuple(leaving)
    return await updates.make(lambda context: _exchange(context.bank, prepared, out))


async def remove_residents(
    updates: BankUpdates, residents: Iterable[ResidentAdapter], forgotten: Collection[str]
) -> int:
    """Take adapters that no row uses out of the bank; returns the bytes that this freed there.

    The prompt caches that were computed with one of the digests in `forgotten` go as well.
    """
    leaving = tuple(residents)
    return await updates.make(lambda context: _remove(context, leaving, frozenset(forgotten)))


def _prepare(folder: AdapterFolder, bank: AdapterBank, limit_bytes: int) -> PreparedAdapter:
    with folder.open() as files:
        _weigh(files, folder.weights_file, bank, limit_bytes)
        adapter = AdapterContainer.from_directory(files, folder.weights_file, folder.scale)
    return bank.prepare(adapter)


def _refuse_too_large(folder: AdapterFolder, bank: AdapterBank, limit_bytes: int) -> None:
    with folder.open() as files:
        _weigh(files, folder.weights_file, bank, limit_bytes)


def _weigh(files: OpenFolder, weights_file: str | None, bank: AdapterBank, limit_bytes: int) -> None:
    needed_bytes = least_memory_bytes(files, weights_file, bank.copies_bytes)
    if needed_bytes > limit_bytes:
        raise AdapterMemoryError(needed_bytes, limit_bytes)


def _check_made(
    name: str, weights: Mapping[str, ModuleWeights], bank: AdapterBank, limit_bytes: int
) -> ResidentAdapter:
    resident = bank.prepare(AdapterContainer.from_weights(weights, name)).resident
    if resident.size_bytes > limit_bytes:
        raise AdapterMemoryError(resident.size_bytes, limit_bytes)
    return resident


def _prepare_again(
    folders: AdapterFolders, folder: AdapterFolder, bank: AdapterBank, limit_bytes: int
) -> PreparedAdapter:
    return _prepare(folders.again(folder), bank, limit_bytes)


def _exchange(
    bank: AdapterBank, prepared: PreparedAdapter, leaving: tuple[ResidentAdapter, ...]
) -> Unfinished | None:
    try:
        for resident in leaving:
            bank.remove(resident)
        bank.add(prepared)
    except Exception as error:
        return Unfinished(error, bank.residents)
    return None


def _remove(context: ModelContext, leaving: tuple[ResidentAdapter, ...], forgotten: frozenset[str]) -> int:
    freed_bytes = sum(context.bank.remove(resident) for resident in leaving)
    if forgotten:
        context.prompt_cache.drop(lambda key: key.names(forgotten))
    return freed_bytes

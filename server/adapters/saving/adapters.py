"""Writes what is loaded as an adapter folder under the adapters root: blends, older versions, any adapter.

A version is read from its private copy or from where it came, and known by its digest; what was written is
read back before the folder gets its name. Nothing that is served changes. One at a time, since a blend that
is made again holds whole matrices, and to its end whoever waits. Runs on the event loop; reads and writes on
another thread.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import structlog

from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError, InvalidAdapterError
from adapters_core.files import new_folder
from adapters_core.formats.adapter_files import AdapterFiles
from adapters_core.formats.notes import writing_notes
from adapters_core.formats.protocol import FormatName
from adapters_core.formats.weights import WEIGHTS_FILE
from adapters_core.formats.writing import adapter_files

from ..errors import (
    AdapterNotSavedError,
    AdapterNotWritableError,
    InvalidAdapterIdError,
    VersionsDifferError,
    quoted,
)
from ..folder import check_id
from ..originals import read_version
from ..registry import Registry
from ..service import AdapterService
from ..versions import Version
from .folders import ADAPTERS, SavedFolders

__all__ = ["AdapterSaver", "SavedAdapter"]

_log = structlog.get_logger(__name__)

_REST_BYTES = 1 << 20  # the config, and the header of the tensors


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A folder that was written: of which version of which id, and what it holds.

    `name` is its name under the adapters root, `size_bytes` what its files take, `digest` that of the adapter
    in it, which may differ from the version's: formats say the same otherwise. `notes` are sentences.
    """

    id: str
    version: int
    name: str
    format: FormatName
    modules: int
    size_bytes: int
    digest: str
    notes: tuple[str, ...]


class AdapterSaver:
    """Saves adapters of `service` under `root` (None: there is no adapters root)."""

    def __init__(self, service: AdapterService, root: Path | None) -> None:
        self._service = service
        self._folders = SavedFolders(root, ADAPTERS)
        self._turn = asyncio.Lock()

    async def save(
        self, adapter_id: str, name: str, to: FormatName = "mlx", number: int | None = None
    ) -> SavedAdapter:
        """Write an adapter that is loaded, as a request may name it, to the new folder `name`.

        `number` asks for a version that lives, as `adapter_id` itself may (`id@2`).

        Raises:
            AdapterNotFoundError, UnknownVersionError: it is not loaded, or not in this version.
            VersionsDifferError: `adapter_id` names one version and `number` another.
            PathNotAllowedError, InvalidAdapterIdError: there is no adapters root, or `name` is not that of an
                adapter's folder in it.
            AdapterFolderExistsError: there is one of this name.
            AdapterNotWritableError: the format cannot say what the adapter is; every reason is listed.
            AdapterNotSavedError: it cannot be written, and nothing of it is left.
            AdapterChangedError, BlendPartChangedError, InvalidAdapterError: its folder, or that of a part of
                a blend, does not hold what was loaded.
            BaseIsFusedError: while anything is fused.
        """
        entry_id, version = _living(self._service.registry, adapter_id, number)
        await asyncio.to_thread(self._folders.check, name)
        _require_usable(name, self._service.registry.base)
        saved = await self._service.to_the_end(self._save(entry_id, version, name, to))
        _log.info("adapter_saved", adapter=entry_id, version=saved.version, saved_to=name, format=to)
        return saved

    async def _save(self, entry_id: str, version: Version, name: str, to: FormatName) -> SavedAdapter:
        async with self._turn:
            model = await self._service.bare_model(f"{quoted(entry_id)} cannot be saved")
            saved = await self._service.aside.run(self._write, entry_id, version, name, to, model)
        await self._service.note_saved(name)
        return saved

    def _write(
        self, entry_id: str, version: Version, name: str, to: FormatName, model: nn.Module
    ) -> SavedAdapter:
        adapter = read_version(version, model, entry_id)
        weights = adapter.check(model)
        files, notes = _as_it_is(adapter) if to == "mlx" else None, []
        if files is None:
            base_name = adapter.base_name or self._service.info.model_id
            try:
                files = adapter_files(
                    weights, to, entry_id, model, base_name=base_name, dropout=adapter.dropout
                )
            except InvalidAdapterError as error:
                raise AdapterNotWritableError(entry_id, to, error.problems) from error
            notes = writing_notes(weights, to)
        needed_bytes = sum(tensor.nbytes for tensor in files.tensors.values()) + _REST_BYTES
        with self._folders.saving(name, needed_bytes) as path, new_folder(path, follow=False) as temporary:
            digest = _write_and_read(files, temporary, name, model)
            size_bytes = sum(file.stat().st_size for file in temporary.iterdir())
        return SavedAdapter(
            entry_id, version.number, name, to, len(weights), size_bytes, digest, tuple(notes)
        )


def _as_it_is(adapter: AdapterContainer) -> AdapterFiles | None:
    """What came in mlx-lm's format, with all that its config says, so that the digest stays the same."""
    try:
        return AdapterFiles(adapter.config.to_values(), adapter.parameters, WEIGHTS_FILE)
    except ContainerStateError:
        return None


def _write_and_read(files: AdapterFiles, folder: Path, name: str, model: nn.Module) -> str:
    """The digest of what was written to `folder`, as whoever loads it will find it."""
    files.write_into(folder)
    try:
        written = AdapterContainer.from_directory(folder)
        written.check(model)
    except InvalidAdapterError as error:
        raise AdapterNotSavedError(name, f"it does not read back: {error.problems[0]}") from error
    return written.digest


def _living(registry: Registry, text: str, number: int | None) -> tuple[str, Version]:
    """The id, and the version that `text` and `number` name now."""
    entry, version = registry.living(text)
    if number in (None, version.number):
        return entry.id, version
    if text.removeprefix(f"{registry.base}:") != entry.id:
        raise VersionsDifferError(text, number)
    return entry.id, registry.living(f"{entry.id}@{number}")[1]


def _require_usable(name: str, base: str) -> None:
    """Refuse what could be a folder and not the id of the adapter in it."""
    try:
        check_id(name, base)
    except InvalidAdapterIdError as error:
        error.param = "save_to"
        raise

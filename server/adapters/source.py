"""Where a version comes from: a folder, or other adapters. Knows no files and no names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from adapters_core.container import AdapterContainer

from .errors import AdapterNotReadableError
from .folder import AdapterFolder

__all__ = ["Made", "Source", "read_folder"]


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """Made in memory from other adapters, so that there is no folder; `recipe` says how, in JSON's types."""

    recipe: Mapping[str, Any]

    @property
    def shown(self) -> None:
        """The path that clients see: there is none."""
        return None

    def make_again(self, model: nn.Module, name: str) -> AdapterContainer:
        """The adapter, called `name`, over the bare base `model`. Runs on a worker thread.

        Raises:
            AdapterNotReadableError: nobody knows how.
        """
        raise AdapterNotReadableError


Source = AdapterFolder | Made


def read_folder(folder: AdapterFolder) -> AdapterContainer:
    """The adapter, or the checkpoint, in `folder`; reads files, so it runs on a worker thread.

    Raises:
        InvalidAdapterError: with all that is wrong.
        AdapterNotFoundError, OutsideRootError, FolderChangedError: as `AdapterFolder.open`.
    """
    with folder.open() as files:
        return AdapterContainer.from_directory(files, folder.weights_file, folder.scale)

"""Where a version comes from: a folder, or other adapters. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import AdapterNotReadableError
from .folder import AdapterFolder

__all__ = ["Made", "Source", "folder_of"]


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """Made in memory from other adapters, so that there is no folder; `recipe` says how, in JSON's types."""

    recipe: Mapping[str, Any]

    @property
    def shown(self) -> None:
        """The path that clients see: there is none."""
        return None


Source = AdapterFolder | Made


def folder_of(source: Source) -> AdapterFolder:
    """The folder that `source` is. Raises AdapterNotReadableError if it was made in memory."""
    if isinstance(source, Made):
        raise AdapterNotReadableError
    return source

"""What a request computes with: named, resolved at one instant, kept until it ends. Plain state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters_core.mixed.residents import RowAdapters

from .versions import Entry, Version

__all__ = ["Kind", "Pin", "Resolved", "Terms"]

Kind = Literal["base", "adapter", "blend"]

Terms = Sequence[tuple[str, float]]
"""What a request adds to the base, by name: (id, weight)."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request names, at this instant, and the row that computes with it.

    `versions` are what the row computes with or what was named at weight 0, each once, and `entries` where
    each of them belongs. `served_name` is what the answer calls it.
    """

    entries: tuple[Entry, ...]
    versions: tuple[Version, ...]
    row: RowAdapters
    served_name: str


class Pin:
    """What a request computes with, kept until `release`.

    `served_name` is the adapter's name where it is one alone, else the base's.
    """

    __slots__ = ("_release", "row", "served_name")

    def __init__(self, row: RowAdapters, served_name: str, release: Callable[[], None]) -> None:
        self.row = row
        self.served_name = served_name
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let go; only the first call counts."""
        release, self._release = self._release, None
        if release is not None:
            release()

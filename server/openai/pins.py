"""What a request computes with, kept while any part of it is computed. Runs on the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from adapters_core.mixed.residents import RowAdapters

__all__ = ["RowPin", "SharedPin"]

_T = TypeVar("_T")


class RowPin(Protocol):
    """What a name resolved to, and cannot change any more; `release` may be called more than once."""

    @property
    def row(self) -> RowAdapters: ...

    @property
    def served_name(self) -> str: ...

    def release(self) -> None: ...


class SharedPin:
    """A pin that several hold; it is released when the last of them lets go. Made with one holder."""

    def __init__(self, pin: RowPin) -> None:
        self.row = pin.row
        self.served_name = pin.served_name
        self._release_all = pin.release
        self._holders = 1

    def lend(self, take: Callable[[Callable[[], None]], _T]) -> _T:
        """What `take` makes of one more hold, whose release it is given; if it raises, the hold is void."""
        self._holders += 1
        try:
            return take(self.release)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of one hold."""
        self._holders -= 1
        if not self._holders:
            self._release_all()

"""Tells what takes time before a server is ready: a spinner on a terminal, lines elsewhere.

Writes to standard error. `step` may be called from any thread, the rest from the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape

from server.cli.output import warn

__all__ = ["Progress"]


class Progress:
    """A context manager; `stop` may be called early, and again. `tell` writes a line, without a spinner."""

    def __init__(self, tell: Callable[[str], None] = warn) -> None:
        console = Console(stderr=True)
        self._tell = tell
        self._status = console.status("") if console.is_terminal and tell is warn else None

    def step(self, message: str) -> None:
        """What is being done now."""
        if self._status is None:
            self._tell(message)
        else:
            self._status.update(escape(message))
            self._status.start()

    def stop(self) -> None:
        """Take the spinner away, so that others can write."""
        if self._status is not None:
            self._status.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

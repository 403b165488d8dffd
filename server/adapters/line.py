"""A line of those who wait for something that only others can give: first come, first served, for a while.

Knows not what they wait for. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from .errors import AdapterMemoryBusyError
from .gate import Gate

__all__ = ["Attempt", "Line"]

_T = TypeVar("_T")

Attempt = Callable[[bool], _T | None]
"""Tries, at one instant, and returns None to wait. It is told whether it is its turn: if not, others were
there before, and it may take only what those would not want."""


class Line:
    """Attempts are made while `gate` is open; the first in line tries again at each `look_again`."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._waiting: deque[asyncio.Event] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def look_again(self) -> None:
        """Something may have become free: let the first in line try."""
        if self._waiting:
            self._waiting[0].set()

    def close(self) -> None:
        """Nobody waits any longer; whoever would have to is refused."""
        self._closed = True
        for looked in self._waiting:
            looked.set()

    async def in_turn(self, attempt: Attempt[_T], wait_seconds: float) -> _T:
        """What `attempt` returns or raises. Whoever stops waiting, for whatever reason, leaves the line.

        Raises:
            AdapterMemoryBusyError: it waited for `wait_seconds`, or until the line was closed, in vain.
        """
        await self._gate.opened()
        got = attempt(not self._waiting)
        if got is not None:
            return got
        started = time.monotonic()
        looked = asyncio.Event()
        self._waiting.append(looked)
        try:
            async with asyncio.timeout(wait_seconds):
                while not self._closed:
                    if self._waiting[0] is looked:
                        await self._gate.opened()
                        looked.clear()
                        if (got := attempt(True)) is not None:
                            return got
                    await looked.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.remove(looked)
            self.look_again()
        raise AdapterMemoryBusyError(time.monotonic() - started)

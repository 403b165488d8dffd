"""A line of those who wait for something that only others can give: first come, first served, for a while.

Knows not what they wait for. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from ..errors import AdapterMemoryBusyError
from ..gate import Gate

__all__ = ["Attempt", "Line"]

_T = TypeVar("_T")

Attempt = Callable[[bool], _T | None]
"""Tries, at one instant, and returns None to wait. It is told whether it is its turn: if not, others were
there before, and it may take only what those would not want."""


class Line:
    """Attempts are made while `gate` is open; the first in line tries again at each `look_again`.

    At most `max_waiting` wait, for `wait_seconds` each.
    """

    def __init__(self, gate: Gate, max_waiting: int, wait_seconds: float) -> None:
        self.max_waiting = max_waiting
        self._gate = gate
        self._wait_seconds = wait_seconds
        self._waiting: OrderedDict[asyncio.Event, None] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def look_again(self) -> None:
        """Something may have become free: let the first in line try."""
        if self._waiting:
            self._first.set()

    def close(self) -> None:
        """Nobody waits any longer; whoever would have to is refused."""
        self._closed = True
        for looked in self._waiting:
            looked.set()

    async def in_turn(self, attempt: Attempt[_T]) -> _T:
        """What `attempt` returns or raises. Whoever stops waiting, for whatever reason, leaves the line.

        Raises:
            AdapterMemoryBusyError: it waited as long as one may, or until the line was closed, in vain; or
                it did not wait, for as many as may wait already.
        """
        await self._gate.opened()
        got = attempt(not self._waiting)
        if got is not None:
            return got
        if len(self._waiting) >= self.max_waiting:
            raise AdapterMemoryBusyError.crowded(len(self._waiting))
        started = time.monotonic()
        looked = asyncio.Event()
        self._waiting[looked] = None
        try:
            async with asyncio.timeout(self._wait_seconds):
                while not self._closed:
                    if self._first is looked:
                        await self._gate.opened()
                        looked.clear()
                        if (got := attempt(True)) is not None:
                            return got
                    await looked.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[looked]
            self.look_again()
        raise AdapterMemoryBusyError.in_vain(time.monotonic() - started)

    @property
    def _first(self) -> asyncio.Event:
        return next(iter(self._waiting))

"""Turns to read an adapter: one at a time, and a part of the time alone while that holds up running streams.

Where the base computes on the CPU, reading and laying out take what its products need, and a step beside them
takes twice as long or more. So what comes in at once is spread over a time, which bounds each stream's gaps,
and still several come in while one long step is computed. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["ReadingPace"]

_PARTS = 3  # of the time, of which reading takes one


class ReadingPace:
    """`is_held_up` says whether reading now takes from what computes running requests."""

    def __init__(self, is_held_up: Callable[[], bool]) -> None:
        self._is_held_up = is_held_up
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The only one that reads; the next may begin with its end, or a while later."""
        await self._turn.acquire()
        started = time.perf_counter()
        try:
            yield
        finally:
            took_seconds = time.perf_counter() - started
            pause_seconds = (_PARTS - 1) * took_seconds if self._is_held_up() else 0.0
            asyncio.get_running_loop().call_later(pause_seconds, self._turn.release)

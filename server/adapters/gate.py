"""A gate that many pass together or one alone, first come, first served. Runs on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Gate"]


class Gate:
    """Work that leaves the base alone goes through `shared`, surgery on it through `alone`.

    Once someone waits to be alone, nobody new gets in, so that the wait ends.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._opened = asyncio.Event()
        self._opened.set()

    async def opened(self) -> None:
        """Wait until nobody is alone inside, nor waits to be; still true when this returns."""
        while not self._opened.is_set():
            await self._opened.wait()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be inside, perhaps together with others."""
        await self.opened()
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Be inside from this instant on, until as many `leave`s; `opened` holds, or the caller is inside."""
        if not self._opened.is_set() and not self._inside:
            raise RuntimeError("expected the gate to be open, but someone is alone inside")
        self._inside += 1
        self._emptied.clear()

    def leave(self) -> None:
        """Be outside again."""
        self._inside -= 1
        if not self._inside:
            self._emptied.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside when everybody else has left."""
        await self.opened()
        self._opened.clear()
        try:
            await self._emptied.wait()
            yield
        finally:
            self._opened.set()

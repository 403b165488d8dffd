"""Waits until requests have let go of something. Knows not of what. Runs on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .errors import AdapterBusyError

__all__ = ["Releases"]


class Releases:
    """Whoever waits looks again at each `look_again`, and for the last time when this is closed."""

    def __init__(self) -> None:
        self._released = asyncio.Event()
        self._closed = False

    def look_again(self) -> None:
        """Something was released."""
        self._released.set()

    def close(self) -> None:
        """Nobody waits any longer."""
        self._closed = True
        self._released.set()

    async def idle(self, in_flight: Callable[[], int], timeout_seconds: float, what: str) -> None:
        """Wait until `in_flight()` is 0. Raises AdapterBusyError, which names `what`, when the time is up."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while in_flight() and not self._closed:
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            pass
        if in_flight():
            raise AdapterBusyError(
                f"After {timeout_seconds:g} s, {in_flight()} request(s) in flight still use {what}; "
                "everything is as before. Try again, or allow more time.",
                in_flight(),
            )

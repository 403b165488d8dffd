"""The base without requests, for surgery on it, and new ones held back for short whiles alone.

What holds new requests back for as long as one long stream goes on would stop the server. So they are held
back for a while, in which short requests end; if some did not, all go on for a while; and again, until the
time is up. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from ..errors import AdapterBusyError
from ..gate import Gate
from ..registry import Registry
from ..unloading import Unloader

__all__ = ["QuietBase"]

_LONGEST_HOLD_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class QuietBase:
    """New requests are held back for `hold_seconds` at first, then longer, up to 8 s; all go on for
    `open_seconds` in between."""

    registry: Registry
    gate: Gate
    unloader: Unloader
    hold_seconds: float = 2.0
    open_seconds: float = 6.0

    @asynccontextmanager
    async def alone(self, timeout_seconds: float, check: Callable[[], None]) -> AsyncIterator[None]:
        """Within, nothing is computed with the base, and nothing begins. `check` raises what forbids it.

        Raises:
            AdapterBusyError: requests in flight did not end within `timeout_seconds`, or loads did not.
            And what `check` raises, before anybody waits.
        """
        ends, hold_seconds = time.monotonic() + timeout_seconds, self.hold_seconds
        while True:
            async with AsyncExitStack() as stack:
                left = max(0.0, ends - time.monotonic())
                if await self._enter(stack, min(hold_seconds, left), check):
                    yield
                    return
            left = max(0.0, ends - time.monotonic())
            if not left:
                raise AdapterBusyError(
                    f"Within {timeout_seconds:g} s there was no instant at which the base was idle; "
                    f"{self.registry.in_flight} request(s) in flight use it. Everything is as before. "
                    "Try again, or allow more time.",
                    self.registry.in_flight,
                )
            await self._is_idle(min(self.open_seconds, left))
            hold_seconds = min(2 * hold_seconds, _LONGEST_HOLD_SECONDS)

    async def _enter(self, stack: AsyncExitStack, seconds: float, check: Callable[[], None]) -> bool:
        """Hold new requests back, and say whether all others ended within so many seconds."""
        ends = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                await stack.enter_async_context(self.gate.alone())
        except TimeoutError:
            return False
        check()
        return await self._is_idle(max(0.0, ends - time.monotonic()))

    async def _is_idle(self, timeout_seconds: float) -> bool:
        """Whether there is an instant without requests within that time; returns at it."""
        try:
            await self.unloader.idle(lambda: self.registry.in_flight, timeout_seconds, "the base")
        except AdapterBusyError:
            return False
        return True

"""Changes of the bank, in the order in which they are asked for; all that wait are made in one update.

An update waits for the step that is being computed. If each load had one of its own, a step would bring in
one adapter, and requests that come together would be read one after the other. Runs on the event loop; the
changes on the generation thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from server.engine.container import ModelContainer
from server.engine.context import ModelContext

__all__ = ["BankUpdates"]

_T = TypeVar("_T")


class BankUpdates:
    """Those of the bank of the model in `container`."""

    def __init__(self, container: ModelContainer) -> None:
        self._container = container
        self._waiting: deque[tuple[Callable[[ModelContext], Any], Future[Any]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def make(self, change: Callable[[ModelContext], _T]) -> _T:
        """What `change` returns or raises; it is made even if the caller's task is cancelled meanwhile."""
        future: Future[_T] = Future()
        self._waiting.append((change, future))
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(asyncio.wrap_future(future))

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._container.update(self._make_all)
        except BaseException as error:
            while self._waiting:
                self._waiting.popleft()[1].set_exception(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._running = None

    def _make_all(self, context: ModelContext) -> None:
        """Also what was asked for after this update was."""
        while self._waiting:
            change, future = self._waiting.popleft()
            try:
                result = change(context)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

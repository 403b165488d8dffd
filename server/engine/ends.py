"""When requests have ended lately: how long it takes until so many more have.

Knows no queue and no requests. Runs on the event loop.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

__all__ = ["RecentEnds"]

_WINDOW_SECONDS = 60.0


class RecentEnds:
    """The ends of the last minute, or since there is something to end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds."""
        self._clock = clock
        self._ends: deque[float] = deque()
        self._began_seconds = -math.inf

    def begin(self) -> None:
        """There was nothing to end, and now there is."""
        self._began_seconds = self._clock()
        self._ends.clear()

    def note(self) -> None:
        """Something has ended."""
        self._ends.append(self._clock())
        self._forget()

    def seconds_for(self, ends: float) -> float:
        """How long `ends` more take at the pace until now, from 1 to 60 s.

        As long as nothing has ended, as long as that has been so already.
        """
        self._forget()
        seconds = self._clock() - max(self._began_seconds, self._clock() - _WINDOW_SECONDS)
        paced = seconds * ends / len(self._ends) if self._ends else seconds
        return min(max(paced, 1.0), _WINDOW_SECONDS)

    def _forget(self) -> None:
        while self._ends and self._ends[0] < self._clock() - _WINDOW_SECONDS:
            self._ends.popleft()

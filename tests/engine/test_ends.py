"""When there is room again, from when requests have ended lately."""

from __future__ import annotations

import pytest

from server.engine.ends import RecentEnds


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_the_time_for_so_many_ends_follows_the_pace() -> None:
    clock = Clock()
    ends = RecentEnds(clock)
    ends.begin()
    for _ in range(10):
        clock.seconds += 2
        ends.note()
    assert ends.seconds_for(8) == pytest.approx(16)
    assert ends.seconds_for(0.1) == 1
    assert ends.seconds_for(1000) == 60


def test_what_ended_long_ago_does_not_count() -> None:
    clock = Clock()
    ends = RecentEnds(clock)
    ends.begin()
    for _ in range(100):
        clock.seconds += 0.1
        ends.note()
    clock.seconds += 3600
    ends.begin()
    clock.seconds += 4
    assert ends.seconds_for(8) == pytest.approx(4), "nothing has ended for so long"
    ends.note()
    assert ends.seconds_for(8) == pytest.approx(32)
    clock.seconds += 120
    assert ends.seconds_for(8) == 60

"""Turns to read, with readers that note when they read."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from server.adapters.paging.pace import ReadingPace


@pytest.mark.parametrize("is_held_up", [False, True])
async def test_one_reads_at_a_time_and_the_next_waits_where_streams_are_held_up(is_held_up: bool) -> None:
    pace = ReadingPace(lambda: is_held_up)
    spans: list[tuple[float, float]] = []

    async def read() -> None:
        async with pace.turn():
            begun = time.perf_counter()
            await asyncio.sleep(0.02)
            spans.append((begun, time.perf_counter()))

    await asyncio.gather(*(read() for _ in range(4)))
    for (begun, ended), (next_begun, _) in pairwise(spans):
        assert next_begun >= ended + (ended - begun if is_held_up else 0)


async def test_a_turn_ends_with_a_failure_or_a_reader_that_has_gone() -> None:
    pace = ReadingPace(lambda: False)
    with pytest.raises(ValueError, match="unreadable"):
        async with pace.turn():
            raise ValueError("unreadable")

    async def read_for_ever() -> None:
        async with pace.turn():
            await asyncio.Event().wait()

    reading = asyncio.create_task(read_for_ever())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(read_for_ever())
    await asyncio.sleep(0)
    waiting.cancel()
    reading.cancel()
    async with asyncio.timeout(20), pace.turn():
        pass

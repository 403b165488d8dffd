"""The gate: many together, or one alone."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from server.adapters.gate import Gate


async def turns() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Visit:
    """A task that stays inside until it is told to leave."""

    def __init__(self, way: AbstractAsyncContextManager[None]) -> None:
        self.inside = False
        self._leave = asyncio.Event()
        self._way = way
        self.task = asyncio.create_task(self._stay())

    async def _stay(self) -> None:
        async with self._way:
            self.inside = True
            await self._leave.wait()
        self.inside = False

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def test_one_alone_waits_for_all_and_keeps_the_next_out() -> None:
    gate = Gate()
    first, second = Visit(gate.shared()), Visit(gate.shared())
    await turns()
    assert first.inside
    assert second.inside
    alone, late = Visit(gate.alone()), Visit(gate.shared())
    await turns()
    await first.leave()
    await turns()
    assert not alone.inside
    assert not late.inside
    await second.leave()
    await turns()
    assert alone.inside
    assert not late.inside
    other = Visit(gate.alone())
    await turns()
    assert not other.inside
    await alone.leave()
    await turns()
    assert late.inside != other.inside
    for visit in (late, other):
        await visit.leave()
    await gate.opened()


async def test_one_who_gives_up_waiting_leaves_the_gate_open() -> None:
    gate = Gate()
    inside = Visit(gate.shared())
    await turns()
    waiting, late = Visit(gate.alone()), Visit(gate.shared())
    await turns()
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task
    await turns()
    assert late.inside
    for visit in (inside, late):
        await visit.leave()
    async with gate.alone():
        assert not late.inside

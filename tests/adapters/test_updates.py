"""Changes of the bank that wait together, with a container whose updates the test runs by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from server.adapters.memory.updates import BankUpdates
from server.engine.container import ModelContainer
from server.engine.context import ModelContext
from server.engine.errors import EngineStoppedError
from server.engine.messages import Update

CONTEXT = cast(ModelContext, object())


def setting() -> tuple[BankUpdates, list[Update]]:
    """The updates that the generation thread would be given."""
    posted: list[Update] = []
    return BankUpdates(ModelContainer(posted.append)), posted


def run(update: Update) -> None:
    """As the generation thread does."""
    update.future.set_result(update.fn(CONTEXT))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def writing(log: list[int], number: int) -> Callable[[ModelContext], int]:
    def change(context: ModelContext) -> int:
        assert context is CONTEXT
        log.append(number)
        return 10 * number

    return change


async def test_all_that_wait_are_made_in_one_update_in_order() -> None:
    updates, posted = setting()
    log: list[int] = []
    tasks = [asyncio.create_task(updates.make(writing(log, number))) for number in range(3)]
    await settle()
    tasks.append(asyncio.create_task(updates.make(writing(log, 3))))  # the update is on its way already
    await settle()
    assert len(posted) == 1
    run(posted.pop())
    assert await asyncio.gather(*tasks) == [0, 10, 20, 30]
    assert log == [0, 1, 2, 3]
    later = asyncio.create_task(updates.make(writing(log, 4)))
    await settle()
    run(posted.pop())
    assert await later == 40
    await settle()
    assert not posted


async def test_what_is_asked_for_after_an_update_has_run_gets_the_next() -> None:
    updates, posted = setting()
    log: list[int] = []
    first = asyncio.create_task(updates.make(writing(log, 1)))
    await settle()
    run(posted.pop())
    second = asyncio.create_task(updates.make(writing(log, 2)))
    await settle()
    run(posted.pop())
    assert await asyncio.gather(first, second) == [10, 20]


async def test_one_that_raises_concerns_its_caller_alone() -> None:
    updates, posted = setting()
    log: list[int] = []

    def fail(context: ModelContext) -> Any:
        raise RuntimeError("this one")

    failing = asyncio.create_task(updates.make(fail))
    other = asyncio.create_task(updates.make(writing(log, 1)))
    await settle()
    run(posted.pop())
    with pytest.raises(RuntimeError, match="this one"):
        await failing
    assert await other == 10


async def test_it_is_made_although_its_caller_has_gone() -> None:
    updates, posted = setting()
    log: list[int] = []
    gone = asyncio.create_task(updates.make(writing(log, 1)))
    await settle()
    gone.cancel()
    await settle()
    run(posted.pop())
    await settle()
    assert log == [1]
    assert gone.cancelled()


async def test_all_who_wait_hear_of_an_engine_that_has_stopped() -> None:
    updates, posted = setting()
    log: list[int] = []
    tasks = [asyncio.create_task(updates.make(writing(log, number))) for number in range(2)]
    await settle()
    posted.pop().future.set_exception(EngineStoppedError("it has stopped"))
    for task in tasks:
        with pytest.raises(EngineStoppedError):
            await task
    assert log == []

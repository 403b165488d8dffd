"""A call that tells of its progress: nothing is lost at its end, and it goes on when the client leaves."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from fastapi.sse import EventSourceResponse

from server.adapters.fusing.progress import FuseProgress, Tell
from server.routes.progress import with_progress


async def events_of(work: Any) -> AsyncGenerator[bytes]:
    """What a client of the call gets, as it comes."""
    response = await with_progress(work)
    assert isinstance(response, EventSourceResponse)
    return cast("AsyncGenerator[bytes]", response.body_iterator)


def value(event: bytes) -> Any:
    return json.loads(event.decode().removeprefix("data: "))


async def test_what_was_told_at_the_very_end_comes_before_the_answer() -> None:
    async def work(tell: Tell) -> dict[str, Any]:
        for done in (1, 2, 3):
            tell(FuseProgress("merging", done, 3))
        return {"object": "adapter.fusion"}

    *steps, answer, end = [event async for event in await events_of(work)]
    assert [value(step)["done"] for step in steps] == [1, 2, 3]
    assert value(answer) == {"object": "adapter.fusion"}
    assert end == b"data: [DONE]\n\n"


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_that_leaves_leaves_nothing_behind(fails: bool) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    others = asyncio.all_tasks()
    go_on, ended = asyncio.Event(), asyncio.Event()

    async def work(tell: Tell) -> dict[str, Any]:
        tell(FuseProgress("merging", 1, 2))
        await go_on.wait()
        ended.set()
        if fails:
            raise ValueError("too late for anybody to hear")
        return {}

    events = await events_of(work)
    assert value(await anext(events))["done"] == 1
    coming = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    coming.cancel()
    await asyncio.wait({coming})
    await events.aclose()
    go_on.set()
    async with asyncio.timeout(20):
        await ended.wait()
        if left := asyncio.all_tasks() - others:
            await asyncio.wait(left)
    del events, coming
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []

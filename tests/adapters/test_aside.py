"""Threads beside the generation: a fixed number, however much they do."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import mlx.core as mx
import pytest_asyncio

from adapters_core.blending.blend import BlendOptions
from server.adapters.aside import Aside
from server.adapters.blending import Blender
from server.adapters.saving.adapters import AdapterSaver

from .support import House, house

TASKS = Path("/proc/self/task")


def threads() -> int:
    """This process' threads, MLX's with them where the system tells; not asyncio's few, which come late."""
    counted = len(os.listdir(TASKS)) if TASKS.exists() else threading.active_count()
    return counted - sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())


@pytest_asyncio.fixture
async def small_house(model_path: Path, root: Path, tmp_path: Path) -> AsyncIterator[House]:
    """A house with memory for little more than one adapter."""
    async with house(model_path, root, kept_dir=tmp_path / "kept") as started:
        size_bytes = (await started.service.load("a")).entry.current.size_bytes
        await started.service.unload("a")
    async with house(
        model_path, root, kept_dir=tmp_path / "kept", memory_bytes=int(size_bytes * 2.5)
    ) as started:
        await started.service.start([])
        yield started


async def test_aside_computes_on_few_threads() -> None:
    aside = Aside("beside", 3)
    aside.start()
    before = threads()

    def compute(number: int) -> tuple[str, mx.array]:
        answer = mx.ones((4, 4)) * number
        mx.eval(answer)
        return threading.current_thread().name, answer

    done = await asyncio.gather(*(aside.run(compute, number) for number in range(60)))

    assert threads() <= before  # before this thread computes as well
    assert {name for name, _ in done} <= {"beside_0", "beside_1", "beside_2"}
    assert [answer.sum().item() for _, answer in done] == [16.0 * number for number in range(60)]
    aside.close()
    assert not any(thread.name.startswith("beside") for thread in threading.enumerate())


async def test_aside_goes_on_when_its_caller_leaves() -> None:
    aside = Aside("beside", 1)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(20)
        ended.set()

    caller = asyncio.create_task(aside.run(work))
    await asyncio.to_thread(begun.wait, 20)
    caller.cancel()
    go_on.set()

    assert await asyncio.to_thread(ended.wait, 20)
    await asyncio.to_thread(aside.close)


async def test_service_keeps_its_threads_over_cold_loads(small_house: House) -> None:
    service = small_house.service
    names = ["a", "b", "d"]
    right = {name: await small_house.answer(name) for name in names}
    before = threads()

    for turn in range(30):
        name = names[turn % len(names)]
        assert await small_house.answer(name) == right[name]
    for _ in range(10):
        await service.load("a", replace=True)

    assert threads() <= before


async def test_service_keeps_its_threads_over_blends_and_saves(tiny_house: House) -> None:
    await tiny_house.service.start([])
    blender = Blender(tiny_house.service)
    saver = AdapterSaver(tiny_house.service, tiny_house.root)

    async def once(number: int) -> None:
        await blender.blend("mix", [("a", 0.5), ("b", 0.5)], BlendOptions(), replace=number > 0)
        await saver.save("mix", f"mix-{number}")

    await once(0)
    before = threads()
    for number in range(1, 6):
        await once(number)

    assert threads() <= before

"""Loading, replacing, unloading and swapping over a real engine, also at the same time."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError, InvalidAdapterError
from server.adapters.errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterMemoryError,
    AdapterNotFoundError,
    InvalidAdapterIdError,
    UnknownModelError,
)
from tests.adapters.support import House, greedy, house, read_model, tokens_of, turns
from tests.models import make_adapter


def reference(model_path: Path, adapter: Path | None, max_tokens: int = 12) -> list[int]:
    model = read_model(model_path)
    if adapter is not None:
        AdapterContainer.from_directory(adapter).load(into=model)
    return greedy(model, max_tokens)


async def test_each_name_answers_with_its_own_weights(tiny_house: House, model_path: Path) -> None:
    expected = {name: reference(model_path, tiny_house.root / name) for name in ("a", "b", "d")}
    expected["tiny"] = reference(model_path, None)
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    answers = await asyncio.gather(*(tiny_house.answer(name) for name in expected))
    assert dict(zip(expected, answers, strict=True)) == expected
    assert await tiny_house.answer("tiny:a") == expected["a"]
    for default in (None, "", "default"):
        assert await tiny_house.answer(default) == expected["tiny"]
    await tiny_house.service.swap("b")
    for default in (None, "", "default"):
        assert await tiny_house.answer(default) == expected["b"]
    assert await tiny_house.answer("tiny") == expected["tiny"]
    assert await tiny_house.answer(None, [("a", 1.0)]) == expected["a"]
    assert await tiny_house.answer("tiny", [("a", 0.0)]) == expected["tiny"]


async def test_what_was_replaced_leaves_memory_though_its_caller_left(model_path: Path, root: Path) -> None:
    async with house(model_path, root, kept_bytes=0) as tiny:
        await tiny.service.load("a")
        replacing = asyncio.create_task(tiny.service.load("a", "b", replace=True))
        await asyncio.sleep(0)  # it has begun
        replacing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await replacing
        entry = tiny.service.registry.get("a")
        await tiny.until(lambda: entry.current.number == 2 and not entry.retired)
        await turns(tiny)
        assert await tiny.residents() == 1


async def test_a_folder_is_loaded_once_for_all_who_want_it_at_the_same_time(tiny_house: House) -> None:
    service = tiny_house.service
    waiters = [asyncio.create_task(service.resolve("a")) for _ in range(5)]
    await asyncio.sleep(0)  # they have begun to wait
    waiters[0].cancel()
    pins = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(pins[0], asyncio.CancelledError)
    assert len({pin.row for pin in pins[1:] if not isinstance(pin, BaseException)}) == 1
    assert await tiny_house.residents() == 1
    assert service.registry.get("a").in_flight == 4
    for pin in pins[1:]:
        assert not isinstance(pin, BaseException)
        pin.release()
        pin.release()
    assert service.registry.in_flight == 0


async def test_a_load_goes_on_when_its_caller_leaves(tiny_house: House) -> None:
    caller = asyncio.create_task(tiny_house.service.load("a"))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    with pytest.raises(AdapterExistsError):
        await tiny_house.service.load("a")
    assert await tiny_house.residents() == 1


async def test_a_load_on_demand_and_one_by_a_call_make_one_adapter(tiny_house: House) -> None:
    service = tiny_house.service
    pin, loaded = await asyncio.gather(service.resolve("a"), service.load("a"))
    assert loaded.created
    assert [(entry.id, entry.current.number) for entry in service.registry.entries] == [("a", 1)]
    assert await tiny_house.residents() == 1
    pin.release()


async def test_loads_at_the_same_time_of_one_id_make_one_adapter(tiny_house: House) -> None:
    service = tiny_house.service
    results = await asyncio.gather(*(service.load("a") for _ in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AdapterExistsError"] * 2 + ["Loaded"]
    results = await asyncio.gather(
        service.load("b"), service.load("d"), *(service.load("a", replace=True) for _ in range(3))
    )
    assert service.registry.get("a").current.number == 4
    assert await tiny_house.residents() == 4  # what a rollback would lead to is idle
    results = await asyncio.gather(*(service.unload("a") for _ in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AdapterNotFoundError"] * 2 + ["tuple"]
    assert await tiny_house.residents() == 2


async def test_a_request_in_flight_finishes_on_the_version_that_it_began_with(
    tiny_house: House, model_path: Path
) -> None:
    service = tiny_house.service
    old = reference(model_path, tiny_house.root / "a", 400)
    entry = (await service.load("a")).entry
    generation = tiny_house.generate(await service.resolve("a"), max_tokens=3000)
    tokens = await tokens_of(generation, at_most=1)

    shutil.rmtree(tiny_house.root / "a")
    make_adapter(tiny_house.root / "a", read_model(model_path), seed=9)
    loaded = await service.load("a", replace=True)
    assert not loaded.created
    assert entry.current.number == 2
    assert entry.previous is not None
    assert entry.previous.pins == 1
    assert await tiny_house.residents() == 2
    assert await tiny_house.answer("a") == reference(model_path, tiny_house.root / "a")

    tokens += await tokens_of(generation, at_most=tiny_house.engine.stats.completion_tokens + 20)
    assert len(tokens) < 400
    assert tokens == old[: len(tokens)]
    await generation.aclose()
    await tiny_house.until(lambda: not entry.in_flight)
    await tiny_house.service.close()
    assert await tiny_house.residents() == 2  # the old one is idle, for a rollback


async def test_a_replacement_that_fails_leaves_the_old_version(tiny_house: House) -> None:
    service = tiny_house.service
    entry = (await service.load("a", pinned=True)).entry
    before, tokens = entry.current, await tiny_house.answer("a")
    (tiny_house.root / "a" / "adapters.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InvalidAdapterError):
        await service.load("a", replace=True)
    with pytest.raises(AdapterNotFoundError):
        await service.load("a", "nowhere", replace=True)
    assert service.registry.get("a").current is before
    assert entry.pinned
    assert await tiny_house.answer("a") == tokens


async def test_unloading_waits_for_requests_and_refuses_new_ones_at_once(tiny_house: House) -> None:
    service = tiny_house.service
    before = await tiny_house.snapshot()
    await service.load("a", activate=True)
    pin = await service.resolve("a")
    unloading = asyncio.create_task(service.unload("a"))
    await tiny_house.until(lambda: service.registry.get("a").state == "draining")
    with pytest.raises(UnknownModelError, match="'tiny'"):
        await service.resolve("a")
    with pytest.raises(UnknownModelError):
        await service.resolve(None, [("a", 1.0)])
    (await service.resolve("default")).release()
    await service.load("b")  # others are not held up
    assert not unloading.done()
    pin.release()
    _, freed_bytes = await unloading
    assert freed_bytes > 0
    with pytest.raises(UnknownModelError):
        await service.resolve("a")  # load on demand does not bring it back
    await service.unload("b")
    assert await tiny_house.snapshot() == before
    await service.load("a")
    assert await tiny_house.answer("a")


async def test_an_adapter_that_stays_busy_is_served_again(tiny_house: House) -> None:
    service = tiny_house.service
    await service.load("a", activate=True)
    pin = await service.resolve("a")
    with pytest.raises(AdapterBusyError) as raised:
        await service.unload("a", timeout_seconds=0)
    assert raised.value.details == {"in_flight": 1}
    entry = service.registry.get("a")
    assert (entry.state, service.registry.active) == ("ready", "a")
    (await service.resolve("a")).release()
    pin.release()
    await service.unload("a", timeout_seconds=0)


async def test_an_unload_that_gives_up_does_not_undo_a_swap(tiny_house: House) -> None:
    service = tiny_house.service
    await service.load("a", activate=True)
    pin = await service.resolve("a")
    unloading = asyncio.create_task(service.unload("a", timeout_seconds=0.2))
    await tiny_house.until(lambda: service.registry.get("a").state == "draining")
    assert (await service.swap("b")).previous is None
    with pytest.raises(AdapterBusyError):
        await unloading
    assert service.registry.active == "b"
    pin.release()


async def test_swapping_loads_on_demand_and_unloads_the_previous_one(tiny_house: House) -> None:
    service = tiny_house.service
    swapped = await service.swap("a")
    assert (swapped.active, swapped.previous) == ("a", None)
    assert swapped.swap_seconds > 0
    swapped = await service.swap("b", unload_previous=True)
    assert (swapped.active, swapped.previous) == ("b", "a")
    assert [entry.id for entry in service.registry.entries] == ["b"]
    pin = await service.resolve("default")
    await service.swap(None, unload_previous=True)
    await tiny_house.until(lambda: service.registry.get("b").state == "draining")
    pin.release()
    await tiny_house.until(lambda: service.registry.find("b") is None)
    with pytest.raises(AdapterNotFoundError):
        await service.swap("nowhere")
    with pytest.raises(AdapterNotFoundError):
        await service.swap("nowhere", unload_previous=True)
    assert service.registry.active is None


async def test_the_memory_limit_refuses_before_anything_changes(model_path: Path, root: Path) -> None:
    async with house(model_path, root) as first:
        size_bytes = (await first.service.load("a")).entry.current.resident.size_bytes
    async with house(model_path, root, memory_bytes=size_bytes, wait_seconds=0.2) as limited:
        service = limited.service
        await service.load("a")
        for attempt in (service.load("b"), service.resolve("b"), service.swap("b")):
            with pytest.raises(AdapterMemoryError) as raised:
                await attempt
        assert raised.value.details["limit_bytes"] == size_bytes
        assert await limited.residents() == 1
        await service.load("a", replace=True)  # the one that leaves does not count
        pin = await service.resolve("a")
        with pytest.raises(AdapterMemoryError):  # now it stays for a while
            await service.load("a", replace=True)
        pin.release()
        await service.unload("a")
        await service.load("d", "a")


async def test_load_on_demand_can_be_switched_off(model_path: Path, root: Path) -> None:
    async with house(model_path, root, load_on_demand=False) as closed:
        with pytest.raises(UnknownModelError):
            await closed.service.resolve("a")
        assert (await closed.service.swap("a")).active == "a"


async def test_an_operators_adapter_may_lie_outside_and_comes_back_by_its_id(
    model_path: Path, root: Path, tmp_path: Path
) -> None:
    outside = make_adapter(tmp_path / "elsewhere" / "secret", read_model(model_path))
    async with house(model_path, root, configured={"mine": outside}) as started:
        await started.service.start(["mine"])
        entry = started.service.registry.get("mine")
        assert entry.current.source.shown == "secret"
        await started.service.unload("mine")
        assert (await started.service.load("mine")).created


@pytest.mark.parametrize(
    "name", ["nowhere", "broken2", "tiny:", "tiny:tiny", "aa", "A", "../a", "a/", "a\n", "x" * 300]
)
async def test_a_name_that_cannot_be_served_is_unknown(tiny_house: House, name: str) -> None:
    await tiny_house.service.load("a")
    with pytest.raises(UnknownModelError) as raised:
        await tiny_house.service.resolve(name)
    assert "'tiny', 'a'" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300
    with pytest.raises(UnknownModelError):
        await tiny_house.service.resolve(None, [("a", 1.0), (name, 1.0)])
    assert tiny_house.service.registry.in_flight == 0


async def test_an_adapter_that_is_broken_or_cannot_be_blended_is_refused(tiny_house: House) -> None:
    service = tiny_house.service
    for attempt in (service.resolve("broken"), service.load("broken"), service.swap("broken")):
        with pytest.raises(InvalidAdapterError):
            await attempt
    for adapters in ([("d", 0.5)], [("a", 1.0), ("d", 1.0)], [("a", float("nan"))]):
        with pytest.raises(BlendError):
            await service.resolve(None, adapters)
    with pytest.raises(InvalidAdapterIdError):
        await service.load("tiny")
    assert service.registry.in_flight == 0
    (await service.resolve(None, [("a", 0.5), ("b", -1.0)])).release()


async def test_what_an_adapter_left_in_the_prompt_cache_goes_with_it(tiny_house: House) -> None:
    async def cached() -> int:
        return await tiny_house.engine.container.perform(lambda context: context.prompt_cache.stats.entries)

    await tiny_house.answer("tiny")
    await tiny_house.service.load("b", "a")
    await tiny_house.answer("a")
    assert await cached() == 2
    await tiny_house.service.unload("a")
    assert await cached() == 2  # the same content is still loaded under another name
    await tiny_house.service.unload("b")
    assert await cached() == 1

"""Requests that wait for memory: in turn, not for ever, and never for each other in a circle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.adapters.errors import AdapterMemoryBusyError, AdapterMemoryError, UnknownModelError
from server.adapters.gate import Gate
from server.adapters.memory.line import Line
from server.engine.container import ModelContainer
from server.engine.context import ModelContext
from server.engine.messages import SamplingParams, Submit
from tests.adapters.support import NAMES, house, site, tokens_of, turns


async def test_requests_wait_for_room_and_get_it_in_their_order(
    model_path: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, equal_root, memory_bytes=size_bytes) as tight:
        for name in NAMES:
            await tight.answer(name)
        held = await tight.service.resolve("a")
        order: list[str] = []

        async def ask(name: str) -> list[int]:
            pin = await tight.service.resolve(name)
            order.append(name)
            assert tight.service.residency.bytes_held == size_bytes
            return await tokens_of(tight.generate(pin))

        tasks = []
        for name in ("b", "c", "a"):
            tasks.append(asyncio.create_task(ask(name)))
            await turns(tight)
        gone = asyncio.create_task(tight.service.resolve("e"))
        await turns(tight)
        gone.cancel()
        await turns(tight)
        assert order == []
        (await tight.service.resolve("tiny")).release()  # the base waits for nobody
        held.release()
        assert await asyncio.gather(*tasks) == [expected[name] for name in ("b", "c", "a")]
        assert order == ["b", "c", "a"]


async def test_a_wait_has_an_end(model_path: Path, equal_root: Path, size_bytes: int) -> None:
    async with house(model_path, equal_root, memory_bytes=size_bytes, wait_seconds=0.1) as tight:
        pin = await tight.service.resolve("a")
        with pytest.raises(AdapterMemoryBusyError):
            await tight.service.resolve("b")
        with pytest.raises(AdapterMemoryError):
            await tight.service.load("c")
        assert tight.service.registry.find("c") is None
        assert tight.service.registry.in_flight == 1
        pin.release()
        assert (await tight.service.load("c")).created
        (await tight.service.resolve("b")).release()


async def test_the_end_of_a_wait_over_http(model_path: Path, equal_root: Path, size_bytes: int) -> None:
    limits = {"adapter_memory_bytes": size_bytes, "adapter_wait_seconds": 0.1}
    async with site(model_path, equal_root, **limits) as tight:
        pin = await tight.service.resolve("a")
        body = {"model": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        reply = await tight.client.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "adapter_memory_busy")
        assert int(reply.headers["retry-after"]) >= 1
        await tight.call("POST", "/v1/adapters", {"id": "c"}, status=507)
        pin.release()
        await tight.chat("b")
        listing = await tight.call("GET", "/v1/adapters")
        assert [(each["id"], each["resident"], each["state"]) for each in listing["data"]] == [
            ("a", False, "ready"),
            ("b", True, "ready"),
        ]
        assert listing["memory_limit_bytes"] == size_bytes
        metrics = (await tight.client.get("/metrics")).text
        for line in (
            "graft_adapters 2.0",
            "graft_resident_adapters 1.0",
            "graft_adapter_evictions_total 1.0",
            "graft_adapter_cold_loads_total 1.0",
            f"graft_adapter_bytes {float(size_bytes)}",
            f"graft_adapter_memory_limit_bytes {float(size_bytes)}",
        ):
            assert line in metrics


async def test_a_client_that_leaves_while_it_waits_frees_its_place(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with site(model_path, equal_root, adapter_memory_bytes=size_bytes) as tight:
        pin = await tight.service.resolve("a")
        body = json.dumps({"model": "b", "messages": [{"role": "user", "content": "hi"}]}).encode()
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        was_read = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages.empty():
                was_read.set()
            return await messages.get()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "scheme": "http", "http_version": "1.1", "root_path": "", "server": ("localhost", 80),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        call = asyncio.create_task(tight.app(scope, receive, send))
        async with asyncio.timeout(20):
            await was_read.wait()
        while tight.service.registry.find("b") is None:  # it is read, and there is no room for it
            assert not call.done()
            await tight.service.list()
        waiting = asyncio.create_task(tight.service.resolve("c"))
        await tight.service.list()
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(call, 20)
        assert not waiting.done()
        pin.release()
        (await asyncio.wait_for(waiting, 20)).release()
        assert not tight.service.registry.get("b").in_flight


async def test_blends_that_need_the_same_room_all_come_through(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with house(model_path, equal_root, memory_bytes=4 * size_bytes) as wide:
        pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("e", "a"), ("b", "e")]
        blends = [[(first, 0.5), (second, 0.5)] for first, second in pairs]
        answers = [await wide.answer(None, blend) for blend in blends]
    async with house(model_path, equal_root, memory_bytes=2 * size_bytes) as tight:
        async with asyncio.timeout(60):
            got = await asyncio.gather(*(tight.answer(None, blend) for blend in blends * 3))
        assert got == answers * 3
        assert tight.service.residency.committed_bytes == 0
        with pytest.raises(AdapterMemoryError):
            await tight.answer(None, [("a", 0.3), ("b", 0.3), ("c", 0.4)])


async def test_the_first_in_line_gets_its_room_although_others_come_for_what_is_in_use(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with house(model_path, equal_root, memory_bytes=2 * size_bytes) as tight:
        service = tight.service
        pins = {name: [await service.resolve(name) for _ in range(2)] for name in ("a", "b")}
        first = asyncio.create_task(service.resolve("c"))
        await tight.until(lambda: service.registry.find("c") is not None)
        await turns(tight)
        late: list[asyncio.Task[Any]] = []
        for name in ("a", "b", "a", "b"):
            pins[name].pop().release()
            await turns(tight)
            late += [asyncio.create_task(service.resolve(each)) for each in ("a", "b")]
            await turns(tight)
            if not pins["a"]:
                break
        pin = await asyncio.wait_for(first, 20)
        assert service.registry.get("b").current.pins  # it was not waited for
        pin.release()
        for task in late:
            (await asyncio.wait_for(task, 20)).release()
        for pin in pins["b"]:
            pin.release()


async def test_a_line_has_room_for_so_many() -> None:
    line = Line(Gate(), max_waiting=3, wait_seconds=20)
    free = False

    def attempt(is_next: bool) -> bool | None:
        return free or None

    waiting = [asyncio.create_task(line.in_turn(attempt)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(AdapterMemoryBusyError, match="3 requests wait"):
        await line.in_turn(attempt)
    waiting.pop(1).cancel()
    await asyncio.sleep(0)
    assert len(line) == 2
    waiting.append(asyncio.create_task(line.in_turn(attempt)))
    await asyncio.sleep(0)
    free = True
    line.look_again()
    async with asyncio.timeout(20):
        assert await asyncio.gather(*waiting) == [True] * 3


class Held(ModelContainer):
    """A real container whose updates wait until it is open."""

    def __init__(self, inner: ModelContainer) -> None:
        super().__init__(inner._post)
        self._inner = inner
        self.open = asyncio.Event()
        self.open.set()

    async def update(self, fn: Callable[[ModelContext], Any], *, drain: bool = False) -> Any:
        await self.open.wait()
        return await self._inner.update(fn, drain=drain)

    async def perform(self, fn: Callable[[ModelContext], Any]) -> Any:
        return await self._inner.perform(fn)


async def test_so_many_wait_for_loads_and_so_many_in_line_and_no_more(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    options: dict[str, Any] = {"memory_bytes": size_bytes, "max_waiting": 2, "wrap": Held}
    async with house(model_path, equal_root, **options) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        assert isinstance(tight.container, Held)
        tight.container.open.clear()
        waiting = [asyncio.create_task(tight.service.resolve("a")) for _ in range(4)]
        await turns(tight)
        try:
            for name in ("a", "b", "c"):  # c would have to be read first, which is a load as well
                with pytest.raises(AdapterMemoryBusyError):
                    await asyncio.wait_for(tight.service.resolve(name), 10)
            (await tight.service.resolve("tiny")).release()
        finally:
            tight.container.open.set()  # or the house could not close
        async with asyncio.timeout(20):
            for pin in await asyncio.gather(*waiting):
                pin.release()
        assert tight.service.residency.committed_bytes == 0


async def test_a_request_that_the_engine_has_no_place_for_loads_nothing(
    model_path: Path, equal_root: Path
) -> None:
    async with site(model_path, equal_root, max_batch_size=1, max_waiting=0) as full:
        engine = full.app.state.engine
        submit = Submit("long", (), (1, 2, 3), 3000, frozenset(), SamplingParams(temperature=0.0))
        async with engine.generate(submit):
            for path, prompt in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
                ("/v1/completions", {"prompt": "hi"}),
            ):
                error = (await full.call("POST", path, {"model": "b", **prompt}, status=503))["error"]
                assert error["code"] == "server_overloaded"
            assert full.service.registry.find("b") is None


async def test_who_waits_for_an_adapter_that_is_being_unloaded_hears_so_at_once(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with house(model_path, equal_root, memory_bytes=2 * size_bytes) as tight:
        service = tight.service
        for name in ("c", "a", "b"):
            await tight.answer(name)
        pins = [await service.resolve(name) for name in ("a", "b")]
        blend = asyncio.create_task(service.resolve(None, [("a", 0.5), ("c", 0.5)]))
        await turns(tight)
        unload = asyncio.create_task(service.unload("a"))
        with pytest.raises(UnknownModelError):
            await asyncio.wait_for(blend, 10)
        assert not unload.done()
        for pin in pins:
            pin.release()
        await unload


async def test_a_swap_does_not_wait_for_the_load_of_what_it_unloads(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with house(model_path, equal_root, memory_bytes=size_bytes, wrap=Held) as tight:
        service = tight.service
        for name in ("a", "b"):
            await tight.answer(name)
        await service.swap("a")
        assert isinstance(tight.container, Held)
        tight.container.open.clear()
        gone = asyncio.create_task(service.resolve("a"))
        await turns(tight)
        gone.cancel()
        await turns(tight)
        assert service.registry.get("a").uses == 1
        try:
            await asyncio.wait_for(service.swap(None, unload_previous=True), 10)
        finally:
            tight.container.open.set()  # or the house could not close
        await tight.until(lambda: service.registry.find("a") is None)

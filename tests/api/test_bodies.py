"""Bodies: none is asked for before the key is right, and none is larger, slower or one too many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.types import Message, Scope

from server.bodies import BodyLimits, BodyMiddleware
from server.engine.model import LoadedModel
from server.errors import ApiError, error_response
from server.json_body import JsonRoute
from tests.api.serving import CHAT, serving
from tests.api.test_guards import KEY, routes

KIB = 1024


class Sender:
    """A client by hand, and the application that takes its body; `chunk()` sends one more."""

    def __init__(self, middleware: BodyMiddleware, **headers: str) -> None:
        self.sent: list[Message] = []
        self._middleware = middleware
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._chunks: asyncio.Queue[Message] = asyncio.Queue()
        self.task = asyncio.create_task(self._visit())

    async def chunk(self, size_bytes: int, more: bool = True) -> None:
        self._chunks.put_nowait({"type": "http.request", "body": b"x" * size_bytes, "more_body": more})
        for _ in range(5):  # it is taken, and what came of it
            await asyncio.sleep(0)

    async def ended(self) -> tuple[int, dict[str, str], bytes]:
        await asyncio.wait_for(self.task, 30)
        start, *parts = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], headers, b"".join(part["body"] for part in parts)

    async def _visit(self) -> None:
        async def send(message: Message) -> None:
            self.sent.append(message)

        scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": self._headers}
        await self._middleware(scope, self._chunks.get, send)


async def taking(scope: Scope, receive: Any, send: Any) -> None:
    """Asks for the body to its end, then answers with its size."""
    size_bytes = 0
    try:
        while True:
            message = await receive()
            size_bytes += len(message.get("body", b""))
            if not message.get("more_body"):
                break
    except ApiError as error:
        await error_response(error)(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size_bytes).encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def limits(**other: Any) -> BodyLimits:
    return BodyLimits(**{"body_bytes": 1024 * KIB, "memory_bytes": 256 * KIB, "seconds": 30.0} | other)


async def test_bodies_together_take_no_more_than_they_may() -> None:
    middleware = BodyMiddleware(taking, limits())
    first, second = Sender(middleware), Sender(middleware)
    for _ in range(3):
        await first.chunk(100 * KIB)  # 236 KiB of them are counted
    await second.chunk(64 * KIB, more=False)
    assert (await second.ended())[0] == 200, "what is small is not counted"
    third = Sender(middleware)
    await third.chunk(100 * KIB)
    status, headers, body = await third.ended()
    assert (status, headers["retry-after"] != "", headers["connection"]) == (503, True, "close")
    assert json.loads(body)["error"]["code"] == "body_memory_exceeded"
    await first.chunk(1, more=False)
    assert await first.ended() == (200, {}, str(300 * KIB + 1).encode())
    again = Sender(middleware)
    await again.chunk(300 * KIB, more=False)
    assert (await again.ended())[0] == 200, "what was held is given back, also by those that were refused"


async def test_a_body_counts_until_the_answer_begins() -> None:
    answered = asyncio.Event()
    goes_on = asyncio.Event()

    async def streaming(scope: Scope, receive: Any, send: Any) -> None:
        async def send_slowly(message: Message) -> None:
            await send(message)
            answered.set()
            await goes_on.wait()

        await taking(scope, receive, send_slowly)

    middleware = BodyMiddleware(streaming, limits())
    first = Sender(middleware)
    await first.chunk(300 * KIB, more=False)
    await asyncio.wait_for(answered.wait(), 30)
    second = Sender(middleware)
    await second.chunk(300 * KIB, more=False)
    goes_on.set()
    assert [(await sender.ended())[0] for sender in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    ("headers", "sizes"),
    [({"content-length": str(2**20 + 1)}, []), ({"content-length": "9" * 30}, []), ({}, [2**20, 1])],
)
async def test_a_body_too_large_is_refused_early(headers: dict[str, str], sizes: list[int]) -> None:
    sender = Sender(BodyMiddleware(taking, limits(memory_bytes=2**30)), **headers)
    for size in sizes:
        await sender.chunk(size)
    await sender.chunk(512 * KIB)  # what it writes while it is told
    status, told, body = await sender.ended()
    assert (status, told["connection"]) == (413, "close")
    assert json.loads(body)["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("sizes", [[], [1]])
async def test_a_body_too_slow_is_given_up(sizes: list[int]) -> None:
    sender = Sender(BodyMiddleware(taking, limits(seconds=0.05)))
    for size in sizes:
        await sender.chunk(size)
    status, told, body = await sender.ended()
    assert (status, told["connection"]) == (408, "close")
    assert json.loads(body)["error"]["code"] == "body_timeout"


async def test_no_body_is_asked_for_before_the_key_is_right(parrot: LoadedModel) -> None:
    asked = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield b" " * KIB

    async with serving(parrot, api_key=KEY, max_body_bytes=64 * KIB) as service:
        for key, status, most in [("wrong", 401, 64 + 256), (KEY, 413, 64 + 64 + 256)]:
            asked = 0
            headers = {"x-api-key": key, "content-type": "application/json"}
            reply = await service.client.post(CHAT, content=body(), headers=headers)
            assert (reply.status_code, reply.headers["connection"]) == (status, "close")
            assert asked <= most + 3, f"{asked} KiB were taken of an endless body"


async def test_an_answer_that_leaves_no_body_behind_keeps_the_connection(parrot: LoadedModel) -> None:
    async with serving(parrot, api_key=KEY) as service:
        for headers, status in [({}, 401), ({"x-api-key": KEY}, 400)]:
            reply = await service.client.post(CHAT, json={}, headers=headers)
            assert (reply.status_code, reply.headers.get("connection")) == (status, None)


async def test_every_route_with_a_body_checks_the_key_first(parrot: LoadedModel) -> None:
    async with serving(parrot) as service:
        with_body = [route for route in routes(service.app.routes) if getattr(route, "body_field", None)]
        assert len(with_body) >= 8
        for route in with_body:
            assert isinstance(route, APIRoute)
            assert isinstance(route, JsonRoute), f"{route.path} reads its body before the key is checked"

"""How else a request ends: the client leaves, the engine fails, the server is full, nobody expected it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from fastapi.sse import KEEPALIVE_COMMENT

from server.adapters.registry import Registry
from server.engine.model import LoadedModel
from server.openai.responses import ChatReply, Head
from server.openai.run import Usage
from server.openai.streaming import ReplyStream
from server.openai.wire import ChatRequest
from tests.api.serving import CHAT, COMPLETIONS, Service, Visitor, serving
from tests.models import adapter_tensors, adapter_values, write_adapter

FALL = {"messages": [{"role": "user", "content": "fall"}]}


@pytest_asyncio.fixture
async def service(parrot: LoadedModel) -> AsyncIterator[Service]:
    """One for each test, since they count what was computed in all."""
    async with serving(parrot) as started:
        yield started


def endless(path: str, **fields: Any) -> bytes:
    prompt = (
        {"messages": [{"role": "user", "content": "sing"}]} if path == CHAT else {"prompt": ["sing", "sing"]}
    )
    return json.dumps({**prompt, "max_tokens": 400, **fields}).encode()


async def running(service: Service) -> None:
    """Wait until the engine computes something."""
    async with asyncio.timeout(60):
        while not service.engine.stats.running_rows:
            await service.engine.container.perform(lambda context: None)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_client_that_leaves_a_stream_ends_its_computing(service: Service, path: str) -> None:
    visitor = Visitor(service.app, path, endless(path, stream=True))
    visit = asyncio.create_task(visitor.visit())
    for _ in range(4):
        await asyncio.wait_for(visitor.messages.get(), 60)
    visitor.gone.set()
    await asyncio.wait_for(visit, 60)
    await service.idle()
    assert service.engine.stats.completion_tokens < 2 * 400


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_client_that_leaves_while_it_waits_ends_its_computing(service: Service, path: str) -> None:
    visitor = Visitor(service.app, path, endless(path))
    visit = asyncio.create_task(visitor.visit())
    await running(service)
    visitor.gone.set()
    await asyncio.wait_for(visit, 60)
    await service.idle()
    assert service.engine.stats.completion_tokens < 2 * 400
    start = await visitor.messages.get()
    assert start["status"] == 499


@pytest.mark.parametrize("stream", [False, True])
async def test_the_pin_is_released_when_a_request_ends_in_any_way(
    parrot: LoadedModel, tmp_path: Path, stream: bool
) -> None:
    values = adapter_values(keys=["self_attn.q_proj"])
    write_adapter(tmp_path / "echo", values, adapter_tensors(parrot.model, values, size=0.01))
    async with serving(parrot, adapters_dir=tmp_path) as service:
        registry: Registry = service.app.state.adapters.registry
        answer = await service.chat("hello", model="parrot:echo", stop="!")
        assert answer["model"] == "echo"
        assert registry.get("echo").in_flight == 0

        visitor = Visitor(service.app, COMPLETIONS, endless(COMPLETIONS, model="echo", stream=stream))
        visit = asyncio.create_task(visitor.visit())
        await running(service)
        assert registry.get("echo").in_flight == 1
        visitor.gone.set()
        await asyncio.wait_for(visit, 60)
        await service.idle()
        assert registry.get("echo").in_flight == 0

        for fields in ({"max_tokens": 10_000}, {"logit_bias": {"99999": 1}}):
            body = {"prompt": "sing", "model": "echo", **fields}
            assert (await service.client.post(COMPLETIONS, json=body)).status_code == 400
        assert registry.get("echo").in_flight == 0
        await service.client.post(COMPLETIONS, json={"prompt": ["hello", "fall"], "model": "echo"})
        await service.idle()
        assert registry.get("echo").in_flight == 0


async def test_a_failing_engine_is_a_500_that_tells_nothing_of_the_inside(service: Service) -> None:
    reply = await service.client.post(CHAT, json=FALL)
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "generation_failed"
    assert "passwd" not in reply.text
    assert (await service.chat("hello"))["choices"][0]["message"]["content"] == "Hi there!"


async def test_an_engine_that_fails_in_a_stream_ends_it_with_an_error_and_without_done(
    service: Service,
) -> None:
    *chunks, error = await service.events(CHAT, **FALL)
    assert all("choices" in chunk for chunk in chunks)
    assert error["error"]["code"] == "generation_failed"
    assert {"message", "type", "param", "code"} == error["error"].keys()


class _BrokenReply(ChatReply):
    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        raise LookupError("the secret is 42")


async def test_the_unexpected_in_a_stream_is_an_error_without_a_word_of_it(service: Service) -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], "stream": True})
    answer = await service.app.state.text_service.chat(request)
    reply = _BrokenReply(Head("chatcmpl-1", 0, "parrot", "fp"), lambda token: b"", False, False)
    events = [cast(bytes, event) async for event in ReplyStream(answer.run, reply).body_iterator]
    assert b"internal_error" in events[-1]
    assert b"42" not in b"".join(events)
    assert b"[DONE]" not in b"".join(events)


async def test_a_full_server_is_503_with_a_time_to_retry(parrot: LoadedModel) -> None:
    async with serving(parrot, max_waiting=0) as service:
        visitor = Visitor(service.app, COMPLETIONS, endless(COMPLETIONS, n=4))
        visit = asyncio.create_task(visitor.visit())
        await running(service)
        reply = await service.client.post(CHAT, json={"messages": [{"role": "user", "content": "hello"}]})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "server_overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-should-retry" not in reply.headers
        # With the rows that are free, one of these prompts would be taken; all or none are.
        refused = await service.client.post(COMPLETIONS, json={"prompt": ["sing", "sing"], "n": 4})
        assert refused.status_code == 503
        visitor.gone.set()
        await visit
        await service.idle()


async def test_several_prompts_are_taken_all_or_none(parrot: LoadedModel) -> None:
    async with serving(parrot, max_waiting=1) as service:
        prompts = ["sing"] * 12  # more than a batch of 8 and the one that may wait
        reply = await service.client.post(COMPLETIONS, json={"prompt": prompts, "max_tokens": 400})
        assert reply.status_code == 503
        await service.idle()
        assert service.engine.stats.completion_tokens < 400


async def test_the_unexpected_is_a_500_without_a_word_of_it(service: Service) -> None:
    @service.app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the secret is 42")

    reply = await service.client.get("/broken", headers={"x-request-id": "mine"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "42" not in reply.text
    assert reply.headers["x-request-id"] == "mine"


async def test_a_quiet_stream_is_kept_alive(service: Service) -> None:
    held = threading.Event()
    hold = asyncio.create_task(service.engine.container.perform(lambda context: held.wait(10)))
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], "stream": True})
    answer = await service.app.state.text_service.chat(request)
    events = aiter(ReplyStream(answer.run, answer.reply, keepalive_seconds=0.01).body_iterator)
    assert b"assistant" in cast(bytes, await anext(events))
    assert await anext(events) == KEEPALIVE_COMMENT
    held.set()
    rest = [event async for event in events]
    assert rest[-1] == b"data: [DONE]\n\n"
    assert await hold


async def test_stopping_the_server_ends_its_requests(parrot: LoadedModel) -> None:
    async with serving(parrot) as service:
        visitor = Visitor(service.app, CHAT, endless(CHAT, stream=True))
        visit = asyncio.create_task(visitor.visit())
        await running(service)
    await asyncio.wait_for(visit, 60)
    bodies = []
    while not visitor.messages.empty():
        bodies.append((await visitor.messages.get()).get("body", b""))
    text = b"".join(bodies).decode()
    assert "[DONE]" not in text
    assert '"error"' in text

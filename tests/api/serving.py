"""The application over the parrot, and ways to talk to it: httpx, and bare ASGI for clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.engine.engine import Engine
from server.engine.loop import LoopOptions
from server.engine.model import LoadedModel
from server.settings import Settings

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(slots=True)
class Service:
    """A started application. `client` speaks to it as a program on the same machine would."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def engine(self) -> Engine:
        return self.app.state.engine

    async def chat(self, word: str, **fields: Any) -> dict[str, Any]:
        """The answer to one user message; the request must succeed."""
        return await self._post(CHAT, {"messages": [{"role": "user", "content": word}], **fields})

    async def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        return await self._post(COMPLETIONS, {"prompt": prompt, **fields})

    async def events(self, path: str, **fields: Any) -> list[Any]:
        """The data of a stream's events, decoded, `[DONE]` as it is."""
        reply = await self.client.post(path, json={"stream": True, **fields})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        datas = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]

    async def idle(self) -> None:
        """Wait until nothing is being computed any more."""
        async with asyncio.timeout(60):
            while self.engine.stats.running_rows or self.engine.waiting_requests:
                await self.engine.container.perform(lambda context: None)

    async def _post(self, path: str, body: Any) -> dict[str, Any]:
        reply = await self.client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


@asynccontextmanager
async def serving(
    model: LoadedModel, *, max_waiting: int = 64, kind: type[Engine] = Engine, **settings: Any
) -> AsyncIterator[Service]:
    """The application for these settings, started and stopped."""
    options = LoopOptions(max_batch_size=8)
    engine = kind(lambda: model, options, prompt_cache_bytes=1 << 22, max_waiting=max_waiting)
    app = create_app(Settings(model="parrot", **settings), engine)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost:8000", timeout=30
        ) as client:
            yield Service(app, client)


@dataclass(slots=True)
class Visitor:
    """A client by hand: sends one POST, sees messages as they come, and leaves when it wants to."""

    app: FastAPI
    path: str
    body: bytes
    messages: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    _sent: bool = False

    async def visit(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        await self.app(scope, self._receive, self.messages.put)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

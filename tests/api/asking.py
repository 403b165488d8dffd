"""Requests over a parrot whose template shows all that it is told, and what the engine was then asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx

from server.engine.engine import Engine, Generation
from server.engine.messages import Submit
from server.openai.fields import Wire
from server.openai.wire import (
    ChatRequest,
    CompareRequest,
    CompletionRequest,
)
from tests.api.parrot import load_parrot
from tests.api.serving import CHAT, COMPLETIONS, Service, serving
from tests.api.test_compare import COMPARE, write_adapters

CALLS: dict[str, type[Wire]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, COMPARE: CompareRequest}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "greek"}], "seed": 1},
    COMPLETIONS: {"prompt": "greek", "seed": 1},
    COMPARE: {"messages": [{"role": "user", "content": "greek"}], "models": ["parrot", "echo"], "seed": 1},
}
# Shows all that it is told, before the last word.
TEMPLATE = (
    "{% if enable_thinking %}thinks {% endif %}{% if not add_generation_prompt %}ends {% endif %}"
    "{% for message in messages %}{{ message.role }}/{{ message.name }}/{{ message.reasoning_content }}/"
    "{{ message.content }}{% if message.role == 'assistant' %} END{% endif %}{% endfor %}"
)


class Watched(Engine):
    """An engine that remembers what it was asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.submits: list[Submit] = []

    def generate(self, submit: Submit, on_end: Callable[[], None] = lambda: None) -> Generation:
        self.submits.append(submit)
        return super().generate(submit, on_end)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was served: what the engine was asked for, the prompt as text, and the reply."""

    submit: Submit
    prompt: str
    reply: httpx.Response

    @property
    def text(self) -> str:
        choice = self.reply.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    @property
    def weights(self) -> list[float]:
        return [weight for _, weight in self.submit.row]


async def refused(service: Service, fields: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    reply = await service.client.post(path, json=BODIES[path] | fields)
    assert reply.status_code == 400, (path, fields, reply.text)
    error = reply.json()["error"]
    assert len(error["message"]) < 1000
    return error


async def answered(service: Service, fields: dict[str, Any], path: str = CHAT) -> Answered:
    reply = await service.client.post(path, json=BODIES[path] | fields)
    assert reply.status_code == 200, (path, fields, reply.text)
    assert isinstance(service.engine, Watched)
    submit = service.engine.submits[-1]
    return Answered(submit, service.engine.info.tokenizer.decode(list(submit.prompt_tokens)), reply)


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "greek", **fields}]}


@asynccontextmanager
async def watched_service(root: Path) -> AsyncIterator[Service]:
    """An application with the adapters of comparisons under `root`."""
    mx.random.seed(8)
    parrot = load_parrot(TEMPLATE)
    async with serving(parrot, kind=Watched, adapters_dir=write_adapters(parrot, root)) as started:
        yield started

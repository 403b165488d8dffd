"""A tiny model in a folder, adapters for it, and the life cycle over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
from fastapi import FastAPI
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model as load_weights
from mlx_lm.utils import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import ResidentAdapter
from server.adapters.folder import AdapterFolders
from server.adapters.pins import Pin
from server.adapters.service import AdapterService, ServiceOptions
from server.app import create_app
from server.engine.container import ModelContainer
from server.engine.context import ModelContext
from server.engine.engine import Engine, Generation
from server.engine.loop import LoopOptions
from server.engine.messages import Failed, SamplingParams, Submit, Token
from server.engine.model import load_model
from server.settings import Settings
from tests.models import make_adapter, snapshot, tiny_llama

BASE = "tiny"
PROMPT = [5, 17, 40, 3]
NAMES = ["a", "b", "c", "e"]
"""Adapters of one size, for tests of the budget."""
_END = "<end>"
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_ERROR_FIELDS = {"message", "type", "param", "code", "details"}
_ids = count()


def write_model(folder: Path, quantize_bits: int | None = None) -> Path:
    """A complete model folder of a tiny Llama with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)
    fast.chat_template = _TEMPLATE
    model = tiny_llama(vocab_size=len(fast), quantize_bits=quantize_bits)
    config = {**vars(model.args), "eos_token_id": fast.eos_token_id, "max_position_embeddings": 4096}
    if quantize_bits is not None:
        config["quantization"] = {"group_size": 32, "bits": quantize_bits, "mode": "affine"}
    folder.mkdir(parents=True)
    fast.save_pretrained(folder)
    save(folder, folder, model, load_tokenizer(folder), config, donate_model=False)
    return folder


def read_model(folder: Path) -> llama.Model:
    """The weights of a model folder, as mlx-lm reads them."""
    model, _ = load_weights(folder)
    assert isinstance(model, llama.Model)
    return model


def make_adapters(root: Path, model: nn.Module) -> Path:
    """A root with two LoRAs `a` and `b`, a DoRA `d`, and a folder that only looks like an adapter."""
    make_adapter(root / "a", model, seed=1)
    make_adapter(root / "b", model, seed=2, rank=8)
    make_adapter(root / "d", model, "dora", seed=3)
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    (root / "notes").mkdir()
    return root


def greedy(model: nn.Module, max_tokens: int = 12) -> list[int]:
    """What mlx-lm generates for the prompt."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=max_tokens)
    return [int(token) for token, _ in steps]


@dataclass(slots=True)
class House:
    """An engine with the tiny model, the life cycle over it, and its adapters root."""

    engine: Engine
    container: ModelContainer
    service: AdapterService
    root: Path

    def generate(self, pin: Pin, max_tokens: int = 12) -> Generation:
        """A greedy request that computes with `pin` and releases it at its end."""
        submit = Submit(
            request_id=f"r{next(_ids)}",
            row=pin.row,
            prompt_tokens=tuple(PROMPT),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
            sampling=SamplingParams(temperature=0.0),
        )
        return self.engine.generate(submit, pin.release)

    async def answer(self, model: str | None, adapters: list[tuple[str, float]] | None = None) -> list[int]:
        """The tokens that a name answers with."""
        return await tokens_of(self.generate(await self.service.resolve(model, adapters)))

    async def snapshot(self) -> dict[str, bytes]:
        """Everything about the resident model that has to stay the same."""
        return await self.engine.container.perform(lambda context: snapshot(context.model))

    async def residents(self) -> int:
        """How many adapters lie in the bank."""
        return len(await self.bank())

    async def bank(self) -> frozenset[ResidentAdapter]:
        """The adapters that lie in the bank."""
        return await self.engine.container.perform(lambda context: context.bank.residents)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the engine turn until `condition` holds."""
        async with asyncio.timeout(20):
            while not condition():
                await self.engine.container.perform(lambda context: None)


class Held(ModelContainer):
    """A real container that holds one `perform` up until it is open, the next when it is told to."""

    def __init__(self, inner: ModelContainer) -> None:
        super().__init__(inner._post)
        self._inner = inner
        self.holds_next = False
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def update(self, fn: Callable[[ModelContext], Any], *, drain: bool = False) -> Any:
        return await self._inner.update(fn, drain=drain)

    async def perform(self, fn: Callable[[ModelContext], Any]) -> Any:
        if self.holds_next:
            self.holds_next = False
            self.reached.set()
            await self.open.wait()
        return await self._inner.perform(fn)


def answer_of(model_path: Path, folder: Path) -> list[int]:
    """What mlx-lm answers with the adapter in a folder."""
    model: llama.Model = read_model(model_path)
    AdapterContainer.from_directory(folder).load(into=model)
    return greedy(model)


def in_memory(tiny: House) -> list[str]:
    """The ids of the adapters that are in memory now."""
    return [entry.id for entry in tiny.service.registry.entries if entry.current.in_memory]


async def turns(tiny: House, count: int = 8) -> None:
    """Let everything that can go on do so."""
    for _ in range(count):
        await tiny.engine.container.perform(lambda context: None)


async def tokens_of(generation: Generation, at_most: int | None = None) -> list[int]:
    """The tokens of a request, all or the next few."""
    tokens: list[int] = []
    async for event in generation:
        assert not isinstance(event, Failed), event.message
        if isinstance(event, Token):
            tokens.append(event.token)
            if len(tokens) == at_most:
                break
    return tokens


def make_engine(model: Path) -> Engine:
    return Engine(
        lambda: load_model(str(model), dtype="auto"),
        LoopOptions(max_batch_size=8),
        prompt_cache_bytes=1 << 22,
        max_waiting=64,
    )


@asynccontextmanager
async def house(
    model: Path,
    root: Path,
    *,
    configured: dict[str, Path] | None = None,
    wrap: Callable[[ModelContainer], ModelContainer] = lambda container: container,
    **options: Any,
) -> AsyncIterator[House]:
    """The life cycle over a real engine, started and stopped; `wrap` may stand between the two."""
    engine = make_engine(model)
    info = await engine.start()
    folders = AdapterFolders(root, configured)
    container = wrap(engine.container)
    service = AdapterService(
        container, info, BASE, folders, ServiceOptions(**{"memory_bytes": 2**30, **options})
    )
    try:
        yield House(engine, container, service, root)
        assert service.registry.in_flight == 0
    finally:
        await service.close()
        await engine.stop(0.0)


@dataclass(slots=True)
class Site:
    """A started application and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient
    model: Path
    root: Path

    @property
    def service(self) -> AdapterService:
        return self.app.state.adapters

    async def call(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON of an answer, which must have this status; a body of bytes goes as it is."""
        content = body if isinstance(body, bytes) else None
        reply = await self.client.request(method, path, content=content, json=None if content else body)
        assert reply.status_code == status, reply.text
        if status >= 400:
            assert_error_shape(reply.json())
        return reply.json() if reply.headers["content-type"].startswith("application/json") else reply.text

    async def refused(self, method: str, path: str, body: Any, status: int, code: str | None) -> Any:
        """The error object of a call that must fail so, and leave everything as it was."""
        before = await self.call("GET", "/v1/adapters")
        error = (await self.call(method, path, body, status=status))["error"]
        assert error["code"] == code, error
        assert await self.call("GET", "/v1/adapters") == before
        assert str(self.root) not in error["message"]
        return error

    async def ids(self) -> list[str]:
        return [adapter["id"] for adapter in (await self.call("GET", "/v1/adapters"))["data"]]

    async def chat(self, model: str | None, status: int = 200, **fields: Any) -> Any:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 8,
            "temperature": 0,
            **fields,
        }
        if model is not None:
            body["model"] = model
        return await self.call("POST", "/v1/chat/completions", body, status=status)

    async def says(self, model: str | None, **fields: Any) -> str:
        reply = await self.chat(model, **fields)
        return reply["choices"][0]["message"]["content"]


def assert_error_shape(body: Any) -> None:
    """The contract's shape of every error."""
    assert set(body) == {"error"}
    assert _ERROR_FIELDS - {"details"} <= set(body["error"]) <= _ERROR_FIELDS
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"].isprintable()


@asynccontextmanager
async def site(model: Path, root: Path, *, base: str = BASE, **settings: Any) -> AsyncIterator[Site]:
    """The application over a real engine, started and stopped."""
    app = create_app(Settings(model=str(model), served_model_name=base, adapters_dir=root, **settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            yield Site(app, client, model, root)

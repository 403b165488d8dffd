"""Engines with their real thread over tiny models, and how tests hold them up, read and count."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from server.engine.engine import Engine, Generation
from server.engine.loop import LoopOptions
from server.engine.messages import Event, Token
from server.engine.model import LoadedModel

WAIT_SECONDS = 60
"""More than anything here takes on a busy machine."""
ENDLESS_TOKENS = 1_000_000


class Gate:
    """Where forwards wait until a test lets them through; a test can wait until the first one has come."""

    def __init__(self) -> None:
        self._forwards = threading.Semaphore(0)
        self._is_open = False
        self._reached = threading.Event()

    def let_one(self) -> None:
        """Let one more forward through."""
        self._forwards.release()

    def open(self) -> None:
        """Let all through from now on."""
        self._is_open = True
        self._forwards.release()

    def wait(self) -> None:
        self._reached.set()
        if not self._forwards.acquire(timeout=WAIT_SECONDS):
            raise TimeoutError("the test never opened the gate")
        if self._is_open:
            self._forwards.release()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, WAIT_SECONDS)


class Gated(nn.Module):
    """A model whose forwards wait at a gate, so that a test can say when the engine goes on."""

    def __init__(self, model: Any, gate: Gate) -> None:
        super().__init__()
        self.model = model
        self._gate = gate

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        self._gate.wait()
        return self.model(inputs, cache=cache)


def make_engine(
    load: Callable[[], LoadedModel],
    *,
    max_waiting: int = 16,
    prompt_cache_bytes: int = 1 << 22,
    grace_seconds: float = WAIT_SECONDS,
    memory_limit: Callable[[], int | None] = lambda: None,
    **options: Any,
) -> Engine:
    return Engine(
        load,
        LoopOptions(**options),
        prompt_cache_bytes=prompt_cache_bytes,
        max_waiting=max_waiting,
        grace_seconds=grace_seconds,
        memory_limit=memory_limit,
    )


async def collect(generation: Generation) -> list[Event]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [event async for event in generation]


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, Token)]


class Ends:
    """Counts the ends that were told, and waits for them."""

    def __init__(self) -> None:
        self.count = 0
        self._told = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._told.set()

    async def wait(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            await self._told.wait()

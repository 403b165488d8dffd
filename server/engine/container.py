"""What the generation thread owns, and the only door through which others reach it.

ModelContext is touched by the generation thread alone. ModelContainer lives on the event loop: it hands a
function over to that thread and waits. Knows nothing of adapter names, requests or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from adapters_core.bank import AdapterBank
from adapters_core.mixed.residents import RowAdapters, row_key
from adapters_core.mixed.routing import RoutedModel, Routing

from .messages import Update
from .model import LoadedModel
from .prompt_cache import PromptCache

__all__ = ["ModelContainer", "ModelContext"]

_T = TypeVar("_T")


@dataclass(slots=True)
class ModelContext:
    """The resident model and all that hangs on it.

    `fusion` is what undoes the fused adapter (None when none is fused) and `fused_digest` that adapter's
    digest: whoever changes one changes both, in one update that drains.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    digest: str
    bank: AdapterBank
    routed: RoutedModel
    prompt_cache: PromptCache
    fusion: Any = None
    fused_digest: str | None = None

    @classmethod
    def build(cls, loaded: LoadedModel, prompt_cache_bytes: int) -> Self:
        """The context of a model that was just loaded, with no adapter resident."""
        routing = Routing()
        return cls(
            model=loaded.model,
            tokenizer=loaded.info.tokenizer,
            config=loaded.info.config,
            digest=loaded.info.digest,
            bank=AdapterBank(loaded.model, routing),
            routed=RoutedModel(loaded.model, routing),
            prompt_cache=PromptCache(prompt_cache_bytes),
        )

    def cache_key(self, row: RowAdapters) -> Hashable:
        """What a row's KV caches are computed with: the base, what is fused into it, and its adapters."""
        return (self.digest, self.fused_digest, row_key(row))


class ModelContainer:
    """Runs functions on the generation thread, between two steps of the generation.

    A function that was handed over runs even if the caller's task is cancelled while it waits. If the thread
    ends first, the caller gets EngineStoppedError.
    """

    def __init__(self, post: Callable[[Update], None]) -> None:
        self._post = post
        self._lock = asyncio.Lock()

    async def update(self, fn: Callable[[ModelContext], _T], *, drain: bool = False) -> _T:
        """Run `fn`, which may change the model; one update at a time, in the order of the callers.

        With `drain`, the requests being computed finish first and no other is admitted until `fn` has run:
        what changing the base itself needs. What `fn` raises is raised here, and nowhere else.
        """
        async with self._lock:
            return await self._run(fn, drain)

    async def perform(self, fn: Callable[[ModelContext], _T]) -> _T:
        """Run `fn`, which only reads, or changes what no other depends on; it does not queue for updates."""
        return await self._run(fn, False)

    async def _run(self, fn: Callable[[ModelContext], _T], drain: bool) -> _T:
        future: Future[_T] = Future()
        self._post(Update(fn, future, drain))
        return await asyncio.shield(asyncio.wrap_future(future))

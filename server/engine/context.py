"""What the generation thread owns. Touched by that thread alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from adapters_core.bank import AdapterBank
from adapters_core.mixed.residents import RowAdapters, row_key
from adapters_core.mixed.routing import RoutedModel, Routing

from .model import LoadedModel
from .prompt_cache import PromptCache

__all__ = ["CacheKey", "ModelContext"]


class CacheKey(NamedTuple):
    """What KV caches are computed with, and for whom: the digests of the base and of what is fused into it,
    the (digest, weight) terms of the adapters, and the owner, who shares them with nobody else.
    """

    base: str
    fused: str | None
    terms: tuple[tuple[str, float], ...]
    owner: str

    @property
    def weights(self) -> tuple[Hashable, ...]:
        """The key without its owner: what decides the values."""
        return self[:3]

    def names(self, digests: frozenset[str]) -> bool:
        """Whether one of these adapters is among the terms."""
        return any(digest in digests for digest, _ in self.terms)


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
        routing = Routing(loaded.info.forms)
        return cls(
            model=loaded.model,
            tokenizer=loaded.info.tokenizer,
            config=loaded.info.config,
            digest=loaded.info.digest,
            bank=AdapterBank(loaded.model, routing),
            routed=RoutedModel(loaded.model, routing),
            prompt_cache=PromptCache(prompt_cache_bytes),
        )

    def cache_key(self, row: RowAdapters, owner: str = "") -> CacheKey:
        """The key of the KV caches of a row as the model is now."""
        return CacheKey(self.digest, self.fused_digest, row_key(row), owner)

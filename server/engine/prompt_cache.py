"""Finished KV caches, kept by content so that a later prompt with the same beginning starts from them.

An entry is (key, tokens, KV caches): `key` says what the tokens were computed with (base and adapters), so
that nothing is ever shared between different weights. Knows nothing of requests or batches. Runs on the
generation thread.

`mlx_lm.models.cache.LRUPromptCache` is not used: it looks up by walking a trie whose cost grows with the
square of an entry's length (0.16 s for four entries of 8,000 tokens, on the generation thread), a hit does
not make an entry more recent, and it cannot drop what an unloaded adapter left behind.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

__all__ = ["PromptCache", "PromptCacheStats"]


@dataclass(frozen=True, slots=True)
class PromptCacheStats:
    """Counts since the start (`hits`, `misses`) and what is held now (`entries`, `bytes_held`)."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    bytes_held: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    key: Hashable
    tokens: np.ndarray  # (T,) int64
    cache: list[Any]
    size_bytes: int
    trimmable: bool


class PromptCache:
    """At most `max_bytes` of KV caches, the least recently used dropped first; `max_bytes` 0 keeps none."""

    def __init__(self, max_bytes: int, *, max_entries: int = 1024) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._numbers = count()
        self._bytes_held = 0
        self._hits = 0
        self._misses = 0

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept."""
        return self._max_bytes > 0

    @property
    def stats(self) -> PromptCacheStats:
        """The counters now."""
        return PromptCacheStats(self._hits, self._misses, len(self._entries), self._bytes_held)

    def fetch(self, key: Hashable, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """The kept caches that cover most of `tokens`' beginning, and how many tokens they cover.

        The caches are the caller's own and hold exactly that many tokens. At least one token is always left
        to compute, since its logits are needed. (None, 0) if nothing fits.
        """
        if not self.enabled:
            return None, 0
        wanted = np.asarray(tokens, dtype=np.int64)
        best, best_length = -1, 0
        for number, entry in self._entries.items():
            if entry.key != key:
                continue
            length = min(_common_prefix(entry.tokens, wanted), len(wanted) - 1)
            if length > best_length and (entry.trimmable or length == len(entry.tokens)):
                best, best_length = number, length
        if best < 0:
            self._misses += 1
            return None, 0
        self._hits += 1
        self._entries.move_to_end(best)
        entry = self._entries[best]
        cache = copy.deepcopy(entry.cache)  # new cache objects; the arrays are shared, never copied
        surplus = len(entry.tokens) - best_length
        if surplus:
            trim_prompt_cache(cache, surplus)
        return cache, best_length

    def store(self, key: Hashable, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep `cache`, the KV caches of one row that hold exactly `tokens`; they become this object's own.

        Starts their evaluation, so that they do not hold on to the batch that they were taken from.
        """
        if not self.enabled or not tokens:
            return
        size_bytes = sum(entry.nbytes for entry in cache)
        if size_bytes > self._max_bytes:
            return
        mx.async_eval([entry.state for entry in cache])
        new = _Entry(key, np.asarray(tokens, dtype=np.int64), cache, size_bytes, can_trim_prompt_cache(cache))
        for number in [number for number, entry in self._entries.items() if _replaces(new, entry)]:
            self._drop(number)
        self._entries[next(self._numbers)] = new
        self._bytes_held += size_bytes
        while self._bytes_held > self._max_bytes or len(self._entries) > self._max_entries:
            self._drop(next(iter(self._entries)))

    def drop(self, uses: Callable[[Hashable], bool]) -> int:
        """Forget the entries whose key `uses` says yes to; returns the bytes that this frees."""
        before = self._bytes_held
        for number in [number for number, entry in self._entries.items() if uses(entry.key)]:
            self._drop(number)
        return before - self._bytes_held

    def clear(self) -> int:
        """Forget everything; returns the bytes that this frees."""
        return self.drop(lambda _: True)

    def _drop(self, number: int) -> None:
        self._bytes_held -= self._entries.pop(number).size_bytes


def _replaces(new: _Entry, old: _Entry) -> bool:
    """Whether `new` can do all that `old` can: it holds the same tokens, or can be trimmed back to them."""
    if new.key != old.key or len(new.tokens) < len(old.tokens):
        return False
    if len(new.tokens) > len(old.tokens) and not new.trimmable:
        return False
    return _common_prefix(new.tokens, old.tokens) == len(old.tokens)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length

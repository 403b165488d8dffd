"""KV caches, kept by content so that a later prompt with the same beginning starts from them.

An entry is (key, tokens, KV caches): `key` says what the tokens were computed with (base and adapters), so
that nothing is ever shared between different weights. Caches that can be trimmed serve every beginning of
their tokens; others (windows that have moved on, recurrent state) serve only what continues all of them.
Knows nothing of requests or batches. Runs on the generation thread.

`mlx_lm.models.cache.LRUPromptCache` is not used: it looks up by walking a trie whose cost grows with the
square of an entry's length (0.16 s for four entries of 8,000 tokens, on the generation thread), a hit does
not make an entry more recent, and it cannot drop what an unloaded adapter left behind.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, can_trim_prompt_cache, trim_prompt_cache

from .cache_kinds import parts
from .prefixes import PrefixIndex, TokenText

__all__ = ["PromptCache", "PromptCacheStats", "PromptMatch"]


@dataclass(frozen=True, slots=True)
class PromptCacheStats:
    """Counts since the start (`hits`, `misses`, `evictions`) and what is held now (`entries`, `bytes_held`).

    An eviction is an entry that went for want of room; one that a longer entry replaces is none.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes_held: int = 0


@dataclass(frozen=True, slots=True)
class PromptMatch:
    """What is kept for a prompt: tokens that need no computing, and where it parts from another prompt.

    `branch_tokens` is how much of its beginning the prompt shares with an entry that cannot be trimmed back
    to there: if that much were kept, the next prompt with this beginning would find it. 0: nothing shared.
    """

    cached_tokens: int = 0
    branch_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    key: Hashable
    text: TokenText
    cache: list[Any]
    size_bytes: int
    trimmable: bool
    finite: mx.array

    @property
    def name(self) -> tuple[Hashable, TokenText, bool]:
        return self.key, self.text, self.trimmable


@dataclass(frozen=True, slots=True)
class _Shelf:
    """The texts of one key's entries: those that can be trimmed, and those that serve as they are."""

    trimmable: PrefixIndex = field(default_factory=PrefixIndex)
    fixed: PrefixIndex = field(default_factory=PrefixIndex)

    def of(self, trimmable: bool) -> PrefixIndex:
        return self.trimmable if trimmable else self.fixed


class PromptCache:
    """At most `max_bytes` of KV caches, the least recently used dropped first; `max_bytes` 0 keeps none."""

    def __init__(self, max_bytes: int, *, max_entries: int = 1024) -> None:
        self._max_bytes = max_bytes
        self._limit_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[Hashable, TokenText, bool], _Entry] = OrderedDict()
        self._shelves: dict[Hashable, _Shelf] = {}
        self._bytes_held = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept."""
        return self._max_bytes > 0

    @property
    def stats(self) -> PromptCacheStats:
        """The counters now."""
        return PromptCacheStats(
            self._hits, self._misses, self._evictions, len(self._entries), self._bytes_held
        )

    def leave_room(self, limit_bytes: int) -> None:
        """Hold at most `limit_bytes` from now on, and never more than the `max_bytes` of the start."""
        self._limit_bytes = min(self._max_bytes, max(0, limit_bytes))
        self._make_room(0)

    def match(self, key: Hashable, tokens: Sequence[int] | TokenText) -> PromptMatch:
        """What `fetch` would find; counts nothing and touches nothing."""
        wanted = _wanted(tokens)
        _, cached = self._find(key, wanted)
        shelf = self._shelves.get(key)
        branch = 0 if shelf is None else shelf.fixed.closest(wanted)[1]
        return PromptMatch(cached, branch if branch > cached else 0)

    def fetch(self, key: Hashable, tokens: Sequence[int] | TokenText) -> tuple[list[Any] | None, int]:
        """The kept caches that cover most of `tokens`' beginning, and how many tokens they cover.

        The caches are the caller's own and hold exactly that many tokens. At least one token is always left
        to compute, since its logits are needed. (None, 0) if nothing fits.
        """
        if not self.enabled:
            return None, 0
        entry, length = self._find(key, _wanted(tokens))
        if entry is None:
            self._misses += 1
            return None, 0
        self._hits += 1
        self._entries.move_to_end(entry.name)
        cache = copy.deepcopy(entry.cache)  # new cache objects; the arrays are shared, never copied
        surplus = entry.text.tokens - length
        if surplus:
            trim_prompt_cache(cache, surplus)
        return cache, length

    def _find(self, key: Hashable, wanted: TokenText) -> tuple[_Entry | None, int]:
        shelf = self._shelves.get(key)
        if shelf is None:
            return None, 0
        closest, length = shelf.trimmable.closest(wanted)
        fixed = shelf.fixed.longest_beginning(wanted)
        if fixed is not None and fixed.tokens > length:
            entry, length = self._entries[key, fixed, False], fixed.tokens
        elif closest is not None:
            entry = self._entries[key, closest, True]
        else:
            return None, 0
        if not entry.finite.item():  # evaluated since it was stored, when nobody waited for it
            self._drop(entry.name)
            return self._find(key, wanted)
        return entry, length

    def store(self, key: Hashable, tokens: Sequence[int] | TokenText, cache: list[Any]) -> None:
        """Keep `cache`, the KV caches of one row that hold exactly `tokens`; they become this object's own.

        Starts their evaluation, so that they do not hold on to the batch that they were taken from. Caches
        with NaN or infinite numbers are never given out.
        """
        size_bytes = sum(part.nbytes for part in cache)
        if not (self.enabled and tokens) or size_bytes > self._limit_bytes:
            return
        text = _text(tokens)
        trimmable = can_trim_prompt_cache(cache)
        shelf = self._shelves.setdefault(key, _Shelf())
        longer = shelf.trimmable.continuation(text) if trimmable else (text if text in shelf.fixed else None)
        if longer is not None:  # which can do all that this one could
            self._entries.move_to_end((key, longer, trimmable))
            return
        if trimmable:
            shorter = shelf.trimmable.longest_beginning(text)
            if shorter is not None:
                self._drop((key, shorter, True))
        _own_arrays(cache)
        finite = _finite(cache)
        mx.async_eval([part.state for part in cache], finite)
        self._make_room(size_bytes)
        entry = _Entry(key, text, cache, size_bytes, trimmable, finite)
        self._shelves.setdefault(key, _Shelf()).of(trimmable).add(text)
        self._entries[entry.name] = entry
        self._bytes_held += size_bytes

    def _make_room(self, size_bytes: int) -> None:
        while self._entries and (
            self._bytes_held + size_bytes > self._limit_bytes or len(self._entries) >= self._max_entries
        ):
            self._drop(next(iter(self._entries)))
            self._evictions += 1

    def drop(self, uses: Callable[[Any], bool]) -> int:
        """Forget the entries whose key `uses` says yes to; returns the bytes that this frees."""
        before = self._bytes_held
        for name in [name for name, entry in self._entries.items() if uses(entry.key)]:
            self._drop(name)
        return before - self._bytes_held

    def clear(self) -> int:
        """Forget everything; returns the bytes that this frees."""
        return self.drop(lambda _: True)

    def _drop(self, name: tuple[Hashable, TokenText, bool]) -> None:
        entry = self._entries.pop(name)
        self._bytes_held -= entry.size_bytes
        shelf = self._shelves[entry.key]
        shelf.of(entry.trimmable).remove(entry.text)
        if not shelf.trimmable and not shelf.fixed:
            del self._shelves[entry.key]


def _text(tokens: Sequence[int] | TokenText) -> TokenText:
    return tokens if isinstance(tokens, TokenText) else TokenText.of(tokens)


def _wanted(tokens: Sequence[int] | TokenText) -> TokenText:
    """All but the last token, which has to be computed in any case."""
    text = _text(tokens)
    return text.first(max(text.tokens - 1, 0))


def _finite(cache: Sequence[Any]) -> mx.array:
    """Whether the last layer's numbers are finite, which those of a layer before it would spoil; lazy."""
    arrays = cast("list[tuple[str, Any]]", tree_flatten(cache[-1].state if cache else []))
    floats = [one for _, one in arrays if isinstance(one, mx.array) and mx.issubdtype(one.dtype, mx.floating)]
    return mx.all(mx.stack([mx.array(True), *(mx.all(mx.isfinite(one)) for one in floats)]))


def _own_arrays(cache: Iterable[Any]) -> None:
    """Copy recurrent state out of the batch's arrays, of which mlx-lm's extract leaves it a view.

    By `where`, which always computes: `contiguous` copies no view of an array that is at most 16 KiB larger.
    """
    for part in parts(cache):
        if isinstance(part, ArraysCache):
            part.cache = [None if array is None else mx.where(True, array, array) for array in part.cache]

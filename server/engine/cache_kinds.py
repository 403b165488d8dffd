"""What mlx-lm's KV caches of one row can do. Pure; whoever owns the caches asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache, can_trim_prompt_cache

__all__ = ["bears_padding", "parts", "serves_anywhere"]


def parts(cache: Iterable[Any]) -> Iterator[Any]:
    """The caches of a prompt cache, those in lists of caches one by one."""
    for part in cache:
        if isinstance(part, CacheList):
            yield from parts(part.caches)
        else:
            yield part


def serves_anywhere(cache: list[Any]) -> bool:
    """Whether caches like these, however long they get, can be trimmed back to any beginning."""
    return can_trim_prompt_cache(cache) and not any(
        isinstance(part, RotatingKVCache) for part in parts(cache)
    )


def bears_padding(cache: list[Any]) -> bool:
    """Whether rows with these caches may be read padded to one length.

    Not with recurrent state: whether padding stays out of it is left to each model of mlx-lm, and some
    (mamba's, which then are wrong by 0.7 in log-probabilities) do nothing about it.
    """
    return not any(isinstance(part, ArraysCache) for part in parts(cache))

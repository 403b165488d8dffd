"""How fast rows with adapters decode and read beside as many rows on the base. Measures in turns.

Runs on the thread that owns the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import mlx.core as mx

from ..mixed.residents import RowAdapters
from ..mixed.routing import RoutedModel
from ..timing import in_turns
from .report import Ratio
from .rows import merged_cache

__all__ = ["decoding_ratios", "reading_ratios"]

_BLOCK_SECONDS = 0.2
_BLOCKS = {"fewest": 3, "most": 7, "budget_seconds": 8.0}
_MOST_STEPS = 16
_PROMPT_TOKENS = 8
_MOST_READ_TOKENS = 256


class _Decoding:
    """Rows that decode without end, a step being made while the one before it is computed."""

    def __init__(self, routed: RoutedModel, rows: Sequence[RowAdapters]) -> None:
        self._routed = routed
        self._cache = merged_cache(routed, rows)
        logits = routed(_prompts(len(rows), _PROMPT_TOKENS), cache=self._cache)
        self._tokens = mx.argmax(logits[:, -1], axis=-1)
        self.step_seconds(1)

    def step_seconds(self, steps: int) -> float:
        """Seconds of a step, the mean of `steps` after one that warms up."""
        self._step()
        mx.eval(self._tokens)
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        mx.eval(self._tokens)
        return (time.perf_counter() - start) / steps

    def _step(self) -> None:
        before = self._tokens
        self._tokens = mx.argmax(self._routed(before[:, None], cache=self._cache)[:, -1], axis=-1)
        mx.async_eval(self._tokens)
        mx.eval(before)


def decoding_ratios(routed: RoutedModel, sides: Mapping[str, Sequence[RowAdapters]]) -> list[Ratio]:
    """The ratio of each of `sides`, rows of the same number, to that many rows on the base."""
    count = len(next(iter(sides.values())))
    runs = {name: _Decoding(routed, rows) for name, rows in {"": [()] * count, **sides}.items()}
    steps = max(2, min(_MOST_STEPS, round(_BLOCK_SECONDS / runs[""].step_seconds(1))))
    blocks = in_turns(
        {name: lambda run=run: run.step_seconds(steps) for name, run in runs.items()}, **_BLOCKS
    )
    return _ratios("decoding", count, 1, blocks)


def reading_ratios(routed: RoutedModel, sides: Mapping[str, Sequence[RowAdapters]]) -> list[Ratio]:
    """As `decoding_ratios`, for prompts that the base reads in about a fifth of a second."""
    count = len(next(iter(sides.values())))
    length = _PROMPT_TOKENS
    base = [()] * count
    _read_seconds(routed, base, length)
    while length < _MOST_READ_TOKENS and _read_seconds(routed, base, length) < _BLOCK_SECONDS / 3:
        length *= 2
        _read_seconds(routed, base, length)  # what is new about the shape
    all_sides = {"": base, **sides}
    for rows in all_sides.values():
        _read_seconds(routed, rows, length)
    blocks = in_turns(
        {name: lambda rows=rows: _read_seconds(routed, rows, length) for name, rows in all_sides.items()},
        **_BLOCKS,
    )
    return _ratios("reading", count, length, blocks)


def _read_seconds(routed: RoutedModel, rows: Sequence[RowAdapters], length: int) -> float:
    """Seconds to read `length` tokens of each row; as a batch generator does, the logits are left out."""
    cache, prompts = merged_cache(routed, rows), _prompts(len(rows), length)
    mx.eval(prompts)
    start = time.perf_counter()
    routed(prompts, cache=cache)
    mx.eval([entry.state for entry in cache])
    return time.perf_counter() - start


def _prompts(rows: int, length: int) -> mx.array:
    return mx.ones((rows, length), dtype=mx.int32) + mx.arange(rows, dtype=mx.int32)[:, None]


def _ratios(work: str, rows: int, tokens: int, blocks: dict[str, list[float]]) -> list[Ratio]:
    base = blocks.pop("")
    found = []
    for name, seconds in blocks.items():
        ratios = [one / other for one, other in zip(base, seconds, strict=True)]
        found.append(
            Ratio(
                work=work,
                side=name,
                rows=rows,
                tokens=tokens,
                base_ms=1e3 * median(base),
                ratio=median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                blocks=len(ratios),
            )
        )
    return found

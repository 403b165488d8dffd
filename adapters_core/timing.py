"""Ways to do the same, timed in turns, and which of them is faster than noise explains. Knows no MLX."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

__all__ = ["fastest", "in_turns"]

_K = TypeVar("_K")

_MARGIN = 0.05  # by which another has to be faster than the first


def in_turns(
    runs: Mapping[_K, Callable[[], float]],
    *,
    fewest: int,
    most: int,
    budget_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[_K, list[float]]:
    """What each of `runs` returns, called in turn, every second time backwards.

    At least `fewest` and at most `most` times; between these, no turn begins after `budget_seconds`.
    """
    found: dict[_K, list[float]] = {name: [] for name in runs}
    start = clock()
    for turn in range(most):
        if turn >= fewest and clock() - start > budget_seconds:
            break
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            found[name].append(run())
    return found


def fastest(seconds: Mapping[_K, Sequence[float]]) -> _K:
    """The fastest of several, the first of which stays unless another is faster by more than noise.

    That is: by a twentieth in the median of the turns, and in three of four turns.
    """
    first, *others = seconds
    best, best_ratio = first, 1 - _MARGIN
    for name in others:
        ratios = [own / old for own, old in zip(seconds[name], seconds[first], strict=True)]
        faster = sum(ratio < 1 for ratio in ratios)
        if median(ratios) < best_ratio and 4 * faster >= 3 * len(ratios):
            best, best_ratio = name, median(ratios)
    return best

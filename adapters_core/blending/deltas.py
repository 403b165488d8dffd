"""What TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) do to task vectors, one matrix at a time.

A task vector is here the change that an adapter makes to one weight matrix, s·B A. Knows no adapters and no
ranks. NumPy arrays, float32; any thread.
"""

from __future__ import annotations

import numpy as np

__all__ = ["DisjointMean", "WeightedSum", "drop", "trim"]


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """`delta` with zeros but for the ⌊density · size⌋ entries of the largest magnitudes (TIES, step 1)."""
    count = int(density * delta.size)
    if count >= delta.size:
        return delta
    if count == 0:
        return np.zeros_like(delta)
    magnitudes = np.abs(delta).reshape(-1)
    least = np.partition(magnitudes, delta.size - count)[delta.size - count]
    kept = magnitudes > least
    # Of those that are equal to the least, as many as are lacking: the first ones.
    kept[np.flatnonzero(magnitudes == least)[: count - np.count_nonzero(kept)]] = True
    return np.where(kept.reshape(delta.shape), delta, np.float32(0))


def drop(delta: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """`delta` with each entry kept with probability `density`, and divided by it so that the mean stays."""
    if density >= 1.0:
        return delta
    kept = rng.random(delta.shape, dtype=np.float32) < np.float32(density)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a density that float32 takes for 0
        return np.where(kept, delta / np.float32(density), np.float32(0))


class WeightedSum:
    """Σ weight · vector over what is added: task arithmetic (arXiv:2212.04089)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sum = np.zeros(shape, dtype=np.float32)

    def add(self, vector: np.ndarray, weight: float) -> None:
        """Take `vector` (of the sum's shape) in."""
        self._sum += np.float32(weight) * vector

    def merged(self) -> np.ndarray:
        """The sum."""
        return self._sum


class DisjointMean:
    """TIES, steps 2 and 3: entry by entry, a sign is elected and the mean taken of those that have it.

    The sign is that of the sum of the vectors, unweighted (of more mass in total); a sum of exactly 0 elects
    none. The mean is Σ weight · entry / count over the vectors whose entry has this sign, zeros never
    counted. Of a vector with a negative weight the negative is taken, so that it votes for what it adds.

    Holds five matrices however many vectors there are: both signs' sums are kept until the end.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._mass = np.zeros(shape, dtype=np.float32)
        self._sums = [np.zeros(shape, dtype=np.float32) for _ in range(2)]
        self._counts = [np.zeros(shape, dtype=np.uint16) for _ in range(2)]

    def add(self, vector: np.ndarray, weight: float) -> None:
        """Take `vector` (of the sum's shape) in."""
        signed = vector if weight >= 0 else -vector
        self._mass += signed
        for at, agrees in enumerate((signed > 0, signed < 0)):
            self._sums[at] += np.float32(abs(weight)) * np.where(agrees, signed, np.float32(0))
            self._counts[at] += agrees

    def merged(self) -> np.ndarray:
        """The mean of those that agree with the elected sign; 0 where no sign is."""
        is_positive = self._mass > 0
        total = np.where(is_positive, *self._sums) * (self._mass != 0)
        count = np.where(is_positive, *self._counts)
        return total / np.maximum(count, 1).astype(np.float32)

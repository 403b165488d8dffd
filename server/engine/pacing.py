"""How much of the prompts is read in one step, so that the rows which decode meanwhile do not stutter.

Reading happens between two decoding steps, so its time is a gap in every running stream. Both times are
measured as they come, never assumed: the same rule holds on a CPU and on a GPU. Knows tokens and seconds
only; the clock is the caller's. Runs on the generation thread.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LinearFit", "Pace", "first_read"]

# A read may take the time of so many decoding steps.
_DECODE_STEPS = 2.0
# It may take so many times its fixed cost, where that is longer: a shorter read is mostly fixed cost.
_FIXED_COSTS = 2.0
# Up to so many seconds, which nobody notices in a stream, it may take this many times its fixed cost.
_UNNOTICED_SECONDS = 0.1
_UNNOTICED_COSTS = 10.0
# A read that finishes as many prompts as there are rows that decode may take so many times as long again,
_FINISHED_WEIGHT = 5.0
# and none so long as to exceed this many times.
_MOST_WORTH = 4.0
# What is read while no times are known, beside rows that decode and without any.
_UNKNOWN_TOKENS = 256
_UNKNOWN_IDLE_TOKENS = 4096
# The fixed cost of a read in tokens, while no times are known: reading in one go saves it, padding wastes it.
_FORWARD_TOKENS = 64
# Where nobody decodes, a step may take so long before it sees who has come or gone meanwhile.
_IDLE_SECONDS = 1.0
# A measurement counts as at most so many times what was expected: the rest is a compiler's, say. One that is
# so many times shorter shows that those before it were too long: nothing takes less than it has to.
_OUTLIER = 4.0
# Prompts that need a little more than the budget are finished in the same step.
_STRETCH = 1.25
# How far sizes are to lie apart for a fixed cost to be known.
_TRUSTED_SPREAD = 0.05
# How much of what was learnt is left after each further measurement.
_MEMORY = 0.98


class LinearFit:
    """Seconds as a line over a size, fitted to measurements of which the older count less and less."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0  # decaying sums

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._weight > 0

    def observe(self, size: float, seconds: float) -> None:
        """One more measurement; sizes are above 0. One that is far too long counts as less.

        After one that is far too short, all before it are forgotten.
        """
        if self.known:
            expected = self.seconds(size)
            if _OUTLIER * seconds < expected:
                self._weight = self._x = self._y = self._xx = self._xy = 0.0
            else:
                seconds = min(seconds, _OUTLIER * expected)
        self._weight = _MEMORY * self._weight + 1
        self._x = _MEMORY * self._x + size
        self._y = _MEMORY * self._y + seconds
        self._xx = _MEMORY * self._xx + size * size
        self._xy = _MEMORY * self._xy + size * seconds

    def _fit(self) -> tuple[float, float]:
        """Seconds at size 0, and for each one of size; neither is negative."""
        x, y = self._x / self._weight, self._y / self._weight
        if self._spread <= 1e-3:  # one size alone tells nothing of others: half of it is taken to be fixed
            return y / 2, y / 2 / x
        variance = self._xx / self._weight - x * x
        slope = (self._xy / self._weight - x * y) / variance
        slope = min(max(slope, 0.0), y / x)
        return y - slope * x, slope

    @property
    def fixed_seconds(self) -> float:
        """What any size takes at least; 0 while all that was measured is of about one size."""
        return self._fit()[0] if self.known and self._spread > _TRUSTED_SPREAD else 0.0

    @property
    def _spread(self) -> float:
        """The variance of the sizes, in squares of their mean."""
        x = self._x / self._weight
        return self._xx / self._weight / (x * x) - 1

    def seconds(self, size: float) -> float:
        """What a size is likely to take."""
        fixed, slope = self._fit()
        return fixed + slope * size

    def size(self, seconds: float) -> float:
        """What size is likely to take so long; below 0 if none does."""
        fixed, slope = self._fit()
        return (seconds - fixed) / slope if slope > 0 else float("inf")


class Pace:
    """What decoding so many rows and reading so many tokens takes here, and the budget that follows."""

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        self._min_tokens = min(min_tokens, max_tokens)
        self._max_tokens = max_tokens
        self._decoding = LinearFit()
        self._reading = LinearFit()

    def observe(self, seconds: float, *, decoded_rows: int, read_tokens: int) -> None:
        """Learn from a step: how long it took, the rows that decoded in it, the tokens read with padding.

        A step that did both is told apart by what decoding alone is known to take.
        """
        if seconds <= 0:
            return
        if read_tokens == 0:
            if decoded_rows:
                self._decoding.observe(decoded_rows, seconds)
        elif decoded_rows == 0:
            self._reading.observe(read_tokens, seconds)
        elif self._decoding.known:
            self._reading.observe(
                read_tokens, max(seconds - self._decoding.seconds(decoded_rows), seconds / 4)
            )

    def budget_tokens(self, left_tokens: Sequence[int], decoding_rows: int) -> int:
        """Tokens to read in the next step, all prompts and their padding together, while rows decode.

        `left_tokens` are what the prompts lack. Reading that finishes none of them takes about two decoding
        steps' time, or twice its fixed cost (ten times, up to a tenth of a second), where that is more.
        Prompts that can be finished at once are worth a longer gap, the more of them there are against the
        rows that they hold up: once they decode too, every step serves them all.
        """
        if not (self._decoding.known and self._reading.known):
            return min(max(self._min_tokens, _UNKNOWN_TOKENS), self._max_tokens)
        fixed = self._reading.fixed_seconds
        unnoticed = min(_UNNOTICED_COSTS * fixed, _UNNOTICED_SECONDS)
        gap = max(_DECODE_STEPS * self._decoding.seconds(decoding_rows), unnoticed)
        longer = max(gap, _FIXED_COSTS * fixed)
        budget = max(self._reading.size(longer), self._min_tokens)
        for finished, left in enumerate(sorted(left_tokens), start=1):
            needed = left * len(left_tokens)
            share = _FINISHED_WEIGHT * finished / max(decoding_rows, 1)
            worth = gap * (1 + min(share, _MOST_WORTH))
            if self._reading.seconds(needed) <= worth:
                budget = max(budget, needed)
        return int(min(budget, self._max_tokens))

    @property
    def idle_tokens(self) -> int:
        """Tokens to read in the next step, all prompts and their padding together, while nobody decodes."""
        if not self._reading.known:
            return min(self._max_tokens, _UNKNOWN_IDLE_TOKENS)
        return int(min(max(self._reading.size(_IDLE_SECONDS), self._min_tokens), self._max_tokens))

    @property
    def forward_tokens(self) -> int:
        """What a forward that reads costs besides its tokens, in tokens."""
        fixed = self._reading.fixed_seconds
        if fixed == 0:
            return _FORWARD_TOKENS
        slope = self._reading.seconds(1) - fixed
        return int(min(fixed / slope, self._max_tokens)) if slope > 0 else self._max_tokens


def first_read(
    left_tokens: Sequence[int], budget_tokens: int, max_tokens: int, forward_tokens: int = _FORWARD_TOKENS
) -> int:
    """How many tokens of each prompt to read next, all being read as one rectangle.

    `left_tokens` (at least one prompt, each at least 1) are what the prompts lack; a shorter one is padded.
    Short prompts are not padded to a long one's length where reading them first, in a forward of their own
    length, is cheaper; prompts of like length are read in one go. At most `max_tokens` of each, and about
    `budget_tokens` of all. A forward costs as much as `forward_tokens` besides.
    """
    cap = max(1, budget_tokens // len(left_tokens))
    longest = max(left_tokens)
    if longest <= _STRETCH * cap:
        cap = longest
    cap = min(cap, max_tokens)
    ends = sorted({min(left, cap) for left in left_tokens})
    # Backwards: the cheapest way to read everything beyond each end, and the first stop on that way.
    cost = {ends[-1]: 0}
    stop = ends[-1]
    for start in [*reversed(ends[:-1]), 0]:
        rows = sum(left > start for left in left_tokens)
        ways = {end: rows * (end - start) + forward_tokens + cost[end] for end in ends if end > start}
        stop = min(ways, key=lambda end: (ways[end], -end))
        cost[start] = ways[stop]
    return stop

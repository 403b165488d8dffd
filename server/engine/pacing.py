"""How much of the prompts is read in one step, and how often, beside rows that decode.

Reading happens between two decoding steps, so its time is a gap in every running stream; and each read costs
something whatever it reads. Both are measured as they come, never assumed: the same rules hold where a read's
fixed cost is all of it and where there is none. Knows tokens and seconds only; the clock is the caller's.
Runs on the generation thread.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LinearFit", "Pace", "first_read"]

# A read may take the time of so many decoding steps,
_DECODE_STEPS = 4.0
# or, where that is longer, so many times its fixed cost: all reads then cost a twentieth more than one.
_FIXED_COSTS = 20.0
# A gap that this makes longer than so many seconds is only half as many times the fixed cost.
_LONG_SECONDS = 1.5
# A read that finishes as many prompts as there are rows that decode may take so many times as long again,
_FINISHED_WEIGHT = 5.0
# and none so long as to exceed this many times.
_MOST_WORTH = 4.0
# After a read that held up all others, nothing new is read for this part of its time.
_REST = 0.25
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
# Of how many measurements of about one size the mean is taken; older ones count less and less,
_MOST_MEASUREMENTS = 20
# as do those of other sizes with each further one, down to this part of one.
_MEMORY = 0.98
_LEAST_MEASUREMENTS = 0.1
# How many times the least size the largest is to be for a fixed cost to be known.
_TRUSTED_SPREAD = 1.5


class LinearFit:
    """Seconds as a line over a size, fitted to the means of what was measured at sizes of each magnitude.

    So sizes that have not come for long still tell the line's slope, if little. Errors count in parts of the
    seconds, since what is measured of long forwards varies by more.
    """

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float, float]] = {}  # by bits of the size: weight, size, seconds

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._means)

    def observe(self, size: float, seconds: float) -> None:
        """One more measurement; sizes are at least 1, seconds above 0. What is far too long counts as less.

        After one that is far too short, all before it are forgotten.
        """
        if self.known:
            expected = self.seconds(size)
            if _OUTLIER * seconds < expected:
                self._means.clear()
            else:
                seconds = min(seconds, _OUTLIER * expected)
        magnitude = int(size).bit_length()
        weight, x, y = self._means.pop(magnitude, (0.0, 0.0, 0.0))
        for other, (count, *mean) in self._means.items():
            self._means[other] = max(_MEMORY * count, _LEAST_MEASUREMENTS), mean[0], mean[1]
        weight = min(weight + 1, _MOST_MEASUREMENTS)
        self._means[magnitude] = weight, x + (size - x) / weight, y + (seconds - y) / weight

    def _fit(self) -> tuple[float, float]:
        """Seconds at size 0, and for each one of size; neither is negative."""
        means = self._means.values()
        if not self._is_spread:  # one size alone tells nothing of others: half of it is taken to be fixed
            _, x, y = max(means)
            return y / 2, y / 2 / x
        w = wx = wy = wxx = wxy = 0.0
        for weight, x, y in means:
            part = weight / (y * y)
            w, wx, wy = w + part, wx + part * x, wy + part * y
            wxx, wxy = wxx + part * x * x, wxy + part * x * y
        slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
        slope = min(max(slope, 0.0), wxy / wxx)
        return max((wy - slope * wx) / w, 0.0), slope

    @property
    def _is_spread(self) -> bool:
        sizes = [x for _, x, _ in self._means.values()]
        return max(sizes) >= _TRUSTED_SPREAD * min(sizes)

    @property
    def fixed_seconds(self) -> float:
        """What any size takes at least; 0 while all that was measured is of about one size."""
        return self._fit()[0] if self.known and self._is_spread else 0.0

    def seconds(self, size: float) -> float:
        """What a size is likely to take."""
        fixed, slope = self._fit()
        return fixed + slope * size

    def size(self, seconds: float) -> float:
        """What size is likely to take so long; below 0 if none does."""
        fixed, slope = self._fit()
        return (seconds - fixed) / slope if slope > 0 else float("inf")


class Pace:
    """What decoding so many rows and reading so many tokens takes here, and what follows from it."""

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        self._min_tokens = min(min_tokens, max_tokens)
        self._max_tokens = max_tokens
        self._decoding = LinearFit()
        self._reading = LinearFit()
        self._rest_seconds = 0.0

    def observe(
        self,
        seconds: float,
        *,
        decoded_rows: int,
        read_tokens: int,
        waiting_rows: int = 0,
        joined: bool = False,
    ) -> None:
        """Learn from a step: how long it took, the rows that decoded in it, the tokens read with padding.

        A step that did both is told apart by what decoding alone is known to take. `joined`: rows began to
        decode, which takes time of its own and is counted to the reading. `waiting_rows` are those that are
        being read, or wait to be.
        """
        if seconds <= 0:
            return
        if read_tokens == 0:
            self._rest_seconds -= seconds
            if decoded_rows and not joined:
                self._decoding.observe(decoded_rows, seconds)
        elif decoded_rows == 0:
            self._rest_seconds = 0.0
            self._reading.observe(read_tokens, seconds)
        elif self._decoding.known:
            took = max(seconds - self._decoding.seconds(decoded_rows), seconds / 4)
            self._reading.observe(read_tokens, took)
            self._rest_seconds = _REST * took * decoded_rows / (decoded_rows + waiting_rows)

    @property
    def rests(self) -> bool:
        """Whether nothing new is to be read just now, so that rows that decode have their share of the time.

        The share is the smaller, the more rows wait against those that decode.
        """
        return self._rest_seconds > 0

    def budget_tokens(self, left_tokens: Sequence[int], decoding_rows: int) -> int:
        """Tokens to read in the next step, all prompts and their padding together, while rows decode.

        `left_tokens` are what the prompts lack. Reading that finishes none of them takes about two decoding
        steps' time, or several times its fixed cost where that is more, so that reads are few.
        Prompts that can be finished at once are worth a longer gap, the more of them there are against the
        rows that they hold up: once they decode too, every step serves them all.
        """
        if not (self._decoding.known and self._reading.known):
            return min(max(self._min_tokens, _UNKNOWN_TOKENS), self._max_tokens)
        gap = max(_DECODE_STEPS * self._decoding.seconds(decoding_rows), self._worthy_seconds)
        budget = max(self._reading.size(gap), self._min_tokens)
        for finished, left in enumerate(sorted(left_tokens), start=1):
            needed = left * len(left_tokens)
            share = _FINISHED_WEIGHT * finished / max(decoding_rows, 1)
            if self._reading.seconds(needed) <= gap * (1 + min(share, _MOST_WORTH)):
                budget = max(budget, needed)
        return int(min(budget, self._max_tokens))

    @property
    def _worthy_seconds(self) -> float:
        """How long a read is to take for its fixed cost to be little of it."""
        fixed = self._reading.fixed_seconds
        longest = max(_LONG_SECONDS, (1 + _FIXED_COSTS / 2) * fixed)
        return min((1 + _FIXED_COSTS) * fixed, longest)

    @property
    def idle_tokens(self) -> int:
        """Tokens to read in the next step, all prompts and their padding together, while nobody decodes."""
        if not self._reading.known:
            return min(self._max_tokens, _UNKNOWN_IDLE_TOKENS)
        seconds = max(_IDLE_SECONDS, self._worthy_seconds)
        return int(min(max(self._reading.size(seconds), self._min_tokens), self._max_tokens))

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

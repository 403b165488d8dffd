"""How much of the prompts is read in one step, so that the rows which decode meanwhile do not stutter.

Reading happens between two decoding steps, so its time is a gap in every running stream. Both times are
measured as they come, never assumed: the same rule holds on a CPU and on a GPU. Knows tokens and seconds
only; the clock is the caller's. Runs on the generation thread.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pace", "first_read"]

# Reading may take the time of so many decoding steps, and more where many rows wait to join few.
_DECODE_STEPS = 2.0
# What is read while nothing is known of the times yet.
_UNKNOWN_TOKENS = 128
# What a forward costs besides its tokens, in tokens: reading in one go saves it, padding wastes it.
_FORWARD_TOKENS = 64
# Prompts that need a little more than the budget are finished in the same step.
_STRETCH = 1.25
# Weight of the newest measurement in a running average.
_NEWEST = 0.3


class Pace:
    """Running averages of decoding and reading times, and the budget that follows from them."""

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        self._min_tokens = min(min_tokens, max_tokens)
        self._max_tokens = max_tokens
        self.decode_seconds: float | None = None
        self.read_tokens_per_second: float | None = None

    def observe(self, seconds: float, *, decoded_rows: int, read_tokens: int) -> None:
        """Learn from a step: how long it took, the rows that decoded in it, the tokens read with padding.

        A step that did both is told apart by what decoding alone has taken of late.
        """
        if seconds <= 0:
            return
        if read_tokens == 0:
            if decoded_rows:
                self.decode_seconds = _average(self.decode_seconds, seconds)
            return
        if decoded_rows:
            if self.decode_seconds is None:
                return
            # A decoding step can be overestimated, for its rows may have become fewer.
            seconds = max(seconds - self.decode_seconds, seconds / 4)
        self.read_tokens_per_second = _average(self.read_tokens_per_second, read_tokens / seconds)

    def budget_tokens(self, *, decoding_rows: int, joining_rows: int) -> int:
        """Tokens to read in the next step, all rows and their padding together, while rows decode.

        `joining_rows` are read or wait to be read: the more they are against those that they hold up, the
        more is read at once, since that is what lets them all decode together.
        """
        if self.decode_seconds is None or self.read_tokens_per_second is None:
            tokens = float(_UNKNOWN_TOKENS)
        else:
            tokens = _DECODE_STEPS * self.decode_seconds * self.read_tokens_per_second
        tokens *= 1 + joining_rows / max(decoding_rows, 1)
        return int(min(max(tokens, self._min_tokens), self._max_tokens))


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST * (new - old)


def first_read(left_tokens: Sequence[int], budget_tokens: int, max_tokens: int) -> int:
    """How many tokens of each prompt to read next, all being read as one rectangle.

    `left_tokens` (at least one prompt, each at least 1) are what the prompts lack; a shorter one is padded.
    Short prompts are not padded to a long one's length where reading them first, in a forward of their own
    length, is cheaper; prompts of like length are read in one go. At most `max_tokens` of each, and about
    `budget_tokens` of all.
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
        ways = {end: rows * (end - start) + _FORWARD_TOKENS + cost[end] for end in ends if end > start}
        stop = min(ways, key=lambda end: (ways[end], -end))
        cost[start] = ways[stop]
    return stop

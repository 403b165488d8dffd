"""Token sequences in order, so that the longest common beginning with another one is found at once.

Sequences are kept as bytes (4 per token, most significant first), whose order is that of their tokens: the
sequence with the longest common beginning is then a neighbour in that order. Knows nothing of caches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

__all__ = ["PrefixIndex", "TokenText", "common_tokens"]

_TOKEN_BYTES = 4


class TokenText(bytes):
    """Tokens as bytes, in the same order as the tokens themselves."""

    @classmethod
    def of(cls, tokens: Sequence[int]) -> TokenText:
        """The text of `tokens`, each from 0 to 2³² - 1."""
        return cls(np.asarray(tokens, dtype=np.dtype(">u4")).tobytes())

    @property
    def tokens(self) -> int:
        """How many tokens it spells."""
        return len(self) // _TOKEN_BYTES

    def first(self, tokens: int) -> TokenText:
        """The text of the first `tokens` tokens."""
        return TokenText(self[: tokens * _TOKEN_BYTES])


def common_tokens(a: TokenText, b: TokenText) -> int:
    """With how many equal tokens both begin."""
    length = min(a.tokens, b.tokens)
    if length == 0:
        return 0
    differs = np.frombuffer(a, dtype=np.uint32, count=length) != np.frombuffer(
        b, dtype=np.uint32, count=length
    )
    first = int(differs.argmax())
    return first if differs[first] else length


class PrefixIndex:
    """Different texts in order. Each question costs a few comparisons, however many texts there are."""

    def __init__(self) -> None:
        self._texts: list[TokenText] = []

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, text: TokenText) -> bool:
        at = bisect_left(self._texts, text)
        return at < len(self._texts) and self._texts[at] == text

    def add(self, text: TokenText) -> None:
        """Put in a text; one that is there already stays."""
        at = bisect_left(self._texts, text)
        if at == len(self._texts) or self._texts[at] != text:
            self._texts.insert(at, text)

    def remove(self, text: TokenText) -> None:
        """Take out a text.

        Raises:
            KeyError: it is not there.
        """
        at = bisect_left(self._texts, text)
        if at == len(self._texts) or self._texts[at] != text:
            raise KeyError(text)
        del self._texts[at]

    def closest(self, text: TokenText) -> tuple[TokenText | None, int]:
        """A text with the longest common beginning, and how many tokens that is; else (None, 0)."""
        at = bisect_left(self._texts, text)
        found = [(common_tokens(other, text), other) for other in self._texts[max(at - 1, 0) : at + 1]]
        length, best = max(found, default=(0, None), key=lambda pair: pair[0])
        return (best, length) if length else (None, 0)

    def longest_beginning(self, text: TokenText) -> TokenText | None:
        """The longest text that `text` begins with."""
        while True:
            at = bisect_right(self._texts, text) - 1
            if at < 0:
                return None
            before = self._texts[at]
            if text.startswith(before):
                return before
            # Any beginning lies further back, so `before` begins with it too: it is within what both share.
            text = text.first(common_tokens(before, text))

    def continuation(self, text: TokenText) -> TokenText | None:
        """A text that begins with `text`."""
        at = bisect_left(self._texts, text)
        if at < len(self._texts) and self._texts[at].startswith(text):
            return self._texts[at]
        return None

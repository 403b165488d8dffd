"""One choice of a reply: its text so far, why it ended, and the log-probabilities that belong to its text.

Knows no HTTP and no engine, only events. Runs on the event loop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from server.engine.messages import ChoiceFinished, FinishReason, Token
from server.openai.text import TextStream

__all__ = ["Choice", "Piece", "Score"]


@dataclass(frozen=True, slots=True)
class Score:
    """A token that was chosen, with natural log-probabilities; its text begins at `offset_chars`."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset_chars: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Something new of one choice. `reason` is there in its last piece, and only there."""

    choice: int
    text: str
    scores: tuple[Score, ...] = ()
    reason: FinishReason | None = None


class Choice:
    """Turns one choice's events into pieces.

    A token's score goes out with the first character of its text, so that a stop string takes away the scores
    of the tokens that begin in it. A token of which it leaves a part keeps its score.
    """

    def __init__(self, index: int, text: TextStream) -> None:
        self.index = index
        self.reason: FinishReason | None = None
        self.completion_tokens = 0
        self._text = text
        self._held: deque[Score] = deque()

    def add(self, event: Token) -> Piece | None:
        """What this token makes certain, if anything; the last piece if it completes a stop string."""
        if self.reason is not None:
            return None  # tokens that were under way when the stop string was found
        self.completion_tokens += 1
        text = self._text.add(event.token)
        if event.logprob is not None:
            self._held.append(Score(event.token, event.logprob, event.top, self._text.token_offset_chars))
        if self._text.stopped:
            self.reason = "stop"
        scores = self._release()
        if text or scores or self.reason:
            return Piece(self.index, text, scores, self.reason)
        return None

    def end(self, event: ChoiceFinished) -> Piece | None:
        """The last piece, with what was held back; None if a stop string ended the choice before."""
        if self.reason is not None:
            return None
        text = self._text.finish()
        self.completion_tokens = event.completion_tokens
        self.reason = "stop" if self._text.stopped else event.reason
        scores = self._release() if self._text.stopped else self._release_all()
        return Piece(self.index, text, scores, self.reason)

    def _release(self) -> tuple[Score, ...]:
        scores: list[Score] = []
        while self._held and self._held[0].offset_chars < self._text.sent_chars:
            scores.append(self._held.popleft())
        return tuple(scores)

    def _release_all(self) -> tuple[Score, ...]:
        scores, self._held = tuple(self._held), deque()
        return scores

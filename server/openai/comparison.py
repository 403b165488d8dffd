"""A comparison under way: the answers of several models to one prompt, then each one's scores under each.

Knows the engine's events and no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.engine.messages import Scored, Scoring
from server.openai.choice import Choice, Piece
from server.openai.pins import SharedPin
from server.openai.run import Events, EventSource, Run, Submitter, Usage

__all__ = ["AnswerScores", "Comparison", "ScoringSubmitter"]


class ScoringSubmitter(Submitter, Protocol):
    """What is needed of the engine."""

    def score(self, scoring: Scoring, on_end: Callable[[], None]) -> EventSource: ...


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """An answer's tokens, and for each model the natural log-probability of each of them.

    `choice` is the answer's position, and so that of the model that gave it.
    """

    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]


class Comparison:
    """Answers, and scores once all of them are there.

    `run` has one choice for each of `pins`, what the models compute with; `cache_owner` is as in `Submit`.
    Of each pin one hold becomes this object's own: what is scored is computed with the very versions
    that answered. Whoever has a Comparison closes it: that cancels what is still being computed.
    """

    def __init__(
        self,
        engine: ScoringSubmitter,
        run: Run,
        prompt: tuple[int, ...],
        pins: Sequence[SharedPin],
        cache_owner: str = "",
    ) -> None:
        self._engine = engine
        self._run = run
        self._prompt = prompt
        self._cache_owner = cache_owner
        self._pins = list(pins)
        self._answers: list[list[int]] = [[] for _ in run.choices]
        self._scorings: list[EventSource] = []
        self._scores: Events | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The answers, in the order of the models."""
        return self._run.choices

    @property
    def usage(self) -> Usage:
        """What the answers have taken so far; the prompt counts once for each model, which all read it."""
        return self._run.usage

    async def pieces(self, idle_seconds: float | None = None) -> AsyncIterator[Piece | AnswerScores | None]:
        """Every piece of every answer, then each answer's scores; None when nothing comes for a while.

        Raises:
            GenerationFailedError: the engine gave something up.
            EngineStoppedError: it is stopping, so that nothing is scored any more.
        """
        async for piece in self._run.pieces(idle_seconds):
            if piece is not None:
                self._answers[piece.choice].extend(score.token for score in piece.scores)
            yield piece
        async for scores in self._score(idle_seconds):
            yield scores

    async def aclose(self) -> None:
        """Cancel what has not ended; never waits, so that it works in a task that is being cancelled."""
        self._let_go()
        await self._run.aclose()
        if self._scores is not None:
            await self._scores.aclose()
        for scoring in self._scorings:
            await scoring.aclose()

    def _let_go(self) -> None:
        pins, self._pins = self._pins, []
        for pin in pins:
            pin.release()

    async def _score(self, idle_seconds: float | None) -> AsyncIterator[AnswerScores | None]:
        answers = [tuple(tokens) for tokens in self._answers]
        scored = [index for index, tokens in enumerate(answers) if tokens]
        for index in sorted(set(range(len(answers))) - set(scored)):
            yield AnswerScores(index, (), tuple(() for _ in answers))
        if not scored:
            return
        self._submit([answers[index] for index in scored])
        self._scores = Events(self._scorings)
        found: list[dict[int, tuple[float, ...]]] = [{} for _ in answers]
        async for event in self._scores.each(idle_seconds):
            match event:
                case None:
                    yield None
                case model, Scored(answer, logprobs):
                    index = scored[answer]
                    found[index][model] = logprobs
                    if len(found[index]) == len(answers):
                        by_model = tuple(found[index][each] for each in range(len(answers)))
                        yield AnswerScores(index, answers[index], by_model)

    def _submit(self, answers: Sequence[tuple[int, ...]]) -> None:
        """One request to score for each model: they share forwards, and start from what answering kept."""
        for pin in self._pins:
            scoring = Scoring(
                uuid.uuid4().hex,
                pin.row,
                self._prompt,
                tuple(answers),
                self._cache_owner,
                pin.served_name,
            )
            self._scorings.append(
                pin.lend(lambda release, scoring=scoring: self._engine.score(scoring, release))
            )
        self._let_go()

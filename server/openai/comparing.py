"""From a request to compare models to a comparison under way: resolve, pin, tokenise, submit to one batch.

Knows no HTTP. Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from server.adapters.errors import LifeCycleError
from server.engine.messages import SamplingParams
from server.engine.sampling import draw_seed
from server.openai.choice import Choice, Piece
from server.openai.collect import joined
from server.openai.comparison import AnswerScores, Comparison, ScoringSubmitter
from server.openai.comparison_reply import CompareReply
from server.openai.pins import RowPin, SharedPin
from server.openai.run import EventSource, Run
from server.openai.sampling import sampling_params
from server.openai.service import TextService
from server.openai.wire import CompareRequest

__all__ = ["Compared", "ComparisonService", "TogetherResolver"]


class TogetherResolver(Protocol):
    """What is needed of the adapters' life cycle."""

    async def resolve_together(self, models: Sequence[str]) -> Sequence[RowPin]: ...


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison under way and how it is worded. Whoever gets it closes `comparison`."""

    comparison: Comparison
    reply: CompareReply

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece, when all of it is there. Raises as `Comparison.pieces`."""
        comparison = self.comparison
        parts: list[list[Piece]] = [[] for _ in comparison.choices]
        scores: dict[int, AnswerScores] = {}
        async for piece in comparison.pieces():
            if isinstance(piece, AnswerScores):
                scores[piece.choice] = piece
            elif piece is not None:
                parts[piece.choice].append(piece)
        in_order = [scores[index] for index in range(len(parts))]
        return self.reply.whole(joined(comparison.choices, parts), in_order, comparison.usage)


class ComparisonService:
    """Compares models with the prompts, the texts and the limits of `texts`."""

    def __init__(self, engine: ScoringSubmitter, adapters: TogetherResolver, texts: TextService) -> None:
        self._engine = engine
        self._adapters = adapters
        self._texts = texts

    async def compare(self, request: CompareRequest) -> Compared:
        """Start answering a conversation with each model that is named.

        Raises:
            ApiError, LifeCycleError, AdapterError, EngineError: the request is refused, and nothing is
            left of it.
        """
        self._engine.check_room(len(request.models))
        pins = [SharedPin(pin) for pin in await self._resolve(request.models)]
        try:
            prompt = await self._texts.prompter.chat(request)
            run = await self._start(request, prompt, pins)
        except BaseException:
            for pin in pins:
                pin.release()
            raise
        head = self._texts.head("cmp", "")
        reply = CompareReply(
            id=head.id,
            created=head.created,
            system_fingerprint=head.system_fingerprint,
            models=tuple(request.models),
            served_names=tuple(pin.served_name for pin in pins),
            token_bytes=self._texts.decoder.token_bytes,
            includes_usage=request.includes_usage,
        )
        return Compared(Comparison(self._engine, run, prompt, pins, request.cache_salt or ""), reply)

    async def _resolve(self, models: Sequence[str]) -> Sequence[RowPin]:
        try:
            return await self._adapters.resolve_together(models)
        except LifeCycleError as error:
            if error.param == "model":  # as it is called elsewhere
                error.param = "models"
            raise

    async def _start(
        self, request: CompareRequest, prompt: tuple[int, ...], pins: Sequence[SharedPin]
    ) -> Run:
        """Submit every model's answer, or none."""
        sampling = self._sampling(request)
        submits = [self._texts.submit(request, prompt, pin, sampling, "messages") for pin in pins]
        streams = self._texts.decoder.streams(
            len(pins), request.stop, continues=request.continue_final_message
        )
        choices = [Choice(index, stream) for index, stream in enumerate(streams)]
        generations: list[EventSource] = []
        try:
            for pin, submit in zip(pins, submits, strict=True):
                generations.append(
                    pin.lend(lambda release, submit=submit: self._engine.generate(submit, release))
                )
        except BaseException:
            for generation in generations:
                await generation.aclose()
            raise
        return Run(generations, choices, len(prompt) * len(pins))

    def _sampling(self, request: CompareRequest) -> SamplingParams:
        """The same draws for all, so that where answers part, it is for the models' sake."""
        sampling = sampling_params(request, self._texts.info.vocabulary_tokens)
        return sampling if sampling.seed is not None else replace(sampling, seed=draw_seed())

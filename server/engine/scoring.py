"""Requests to be scored: from their start in the batch to their events, beside what is generated.

Knows requests, the schedule and the prompt cache; the arrays are scoring_batch.py's. Runs on the generation
thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .context import ModelContext
from .messages import Event, Finished, Scored
from .requests import Request
from .scheduler import LoopOptions, Scheduler, StepWork
from .scoring_batch import ReadPrompt, ScoringBatch

__all__ = ["Scorer"]


class Scorer:
    """The running requests that score, for one loop; `emit` takes what they have to tell."""

    def __init__(
        self,
        context: ModelContext,
        options: LoopOptions,
        scheduler: Scheduler,
        emit: Callable[[Request, Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.scored_tokens = 0
        """Tokens of answers that were taken, since the start."""
        self._context = context
        self._options = options
        self._scheduler = scheduler
        self._emit = emit
        self._clock = clock
        self._batch = ScoringBatch(context.routed, options.max_batch_size)

    def __len__(self) -> int:
        """Rows, those that wait for a place in a forward included."""
        return len(self._batch)

    def start(self, request: Request) -> None:
        """Begin with a request, which waited until now, from what is kept of its prompt."""
        scoring = request.scoring
        kv_caches, cached = self._context.prompt_cache.fetch(request.key, request.text)
        request.cached_tokens = cached
        answer_tokens = sum(map(len, scoring.answers))
        self._scheduler.start(request, len(scoring.prompt_tokens) - 1 - cached + answer_tokens)
        self.scored_tokens += answer_tokens
        self._batch.start(request, kv_caches, cached)

    def step(self, work: StepWork) -> list[Request]:
        """One forward, beside the `work` that the step has done; adds to it.

        Returns the requests whose logits are not finite, which the caller ends.
        """
        # Without the time of the decoding beside it, its own cannot be told.
        is_known = work.seconds > 0 or not self._scheduler.decoding_rows
        started = self._clock()
        step = self._batch.step(self._scheduler.scored_tokens())
        work.scoring_seconds = self._clock() - started if is_known else 0.0
        work.scored_tokens = step.read_tokens
        for prompt in step.prompts:
            self._keep(prompt)
        broken = {one.request: None for one in step.answers if any(map(math.isnan, one.logprobs))}
        for answer in step.answers:
            if answer.request in broken:
                continue
            self._emit(answer.request, Scored(answer.answer, answer.logprobs))
            self._finish(answer.request, {answer.answer})
        return list(broken)

    def cancel(self, request: Request, answers: set[int]) -> None:
        """Give these answers up; without any that is open, the request ends."""
        self._finish(request, answers)

    def _finish(self, request: Request, answers: set[int]) -> None:
        request.open -= answers
        self._batch.remove(request)
        if not request.open:
            self._scheduler.end(request)
            self._emit(request, Finished(request.cached_tokens))

    def forget(self, request: Request) -> None:
        """Drop the rows of a request that the caller ends."""
        request.open.clear()
        self._batch.remove(request)

    def give_up(self) -> list[Request]:
        """Forget all rows, of which none can be trusted; returns their requests, for the caller to end."""
        self._batch.clear()
        return [request for request in self._scheduler.running.values() if request.is_scoring]

    def _keep(self, prompt: ReadPrompt) -> None:
        """Later prompts may begin with this one, and its caches are there."""
        request, kept = prompt.request, self._context.prompt_cache
        tokens = request.text.tokens - 1
        if tokens - request.cached_tokens >= self._options.keep_prompt_tokens:
            kept.store(request.key, request.text.first(tokens), prompt.kv_caches)

"""Continuous batching of requests over one routed model: pure and synchronous.

Each `step` reads: run updates → admit requests → one forward of the batch → turn what came of it into events.
Who is admitted and how much is read is for `scheduler.py` to say; rows are `decoding.py`'s and, of answers
that are scored, `scoring.py`'s. Knows no threads, no event loop, no text and no adapter names. Whoever calls
it, always from the thread that owns the model, hands it messages between two steps and carries the events
away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from .context import ModelContext
from .decoding import Decoder
from .errors import InvalidSubmitError
from .kv_memory import KvMemory
from .messages import Cancel, Event, Failed, FailureKind, Scoring, Submit, Update
from .prompt_cache import PromptCacheStats, PromptMatch
from .requests import Request
from .sampling import draw_seed
from .scheduler import LoopOptions, Scheduler, StepWork
from .scoring import Scorer
from .warming import warm

__all__ = ["GenerationLoop", "LoopOptions", "LoopStats"]

_log = structlog.get_logger(__name__)

_FAILED = "the engine failed while it computed this request"


@dataclass(frozen=True, slots=True)
class LoopStats:
    """What is there now, and totals since the start; `completion_tokens` counts stop tokens too.

    `running_rows` decode or read a prompt; `scoring_rows` are those of answers that are scored. `failures`
    counts the requests that ended in Failed.
    """

    running_rows: int = 0
    scoring_rows: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    batch_adapters: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0
    failures: int = 0
    prompt_cache: PromptCacheStats = field(default_factory=PromptCacheStats)


class GenerationLoop:
    """Every request ends in exactly one Finished or Failed, after which nothing more is said about it.

    An update that raises, or a request that cannot start, concerns its own caller alone. A forward that
    raises fails the requests that were in it, and the loop goes on with those that wait.
    """

    def __init__(
        self,
        context: ModelContext,
        options: LoopOptions,
        clock: Callable[[], float] = time.perf_counter,
        memory: KvMemory | None = None,
    ) -> None:
        """`clock` tells seconds; `memory` bounds what rows and kept prompts take (None: nothing does)."""
        self._context = context
        self._clock = clock
        self._scheduler = Scheduler(options, memory)
        self._decoder = Decoder(context, options, self._scheduler, self._emit, clock)
        self._scorer = Scorer(context, options, self._scheduler, self._emit, clock)
        self._updates: deque[Update] = deque()
        self._events: list[tuple[str, Event]] = []
        self._failures = 0

    def warm(self, context_tokens: int) -> None:
        """Let the model compute a little before the first request; a failure is told in the log alone.

        Rows have no more than `context_tokens`.
        """
        scheduler = self._scheduler
        try:
            warm(
                self._context,
                scheduler.pace,
                self._clock,
                context_tokens=context_tokens,
                most_tokens=scheduler.memory.most_read_tokens(0),
            )
        except Exception:
            _log.exception("the model could not be warmed")

    # Messages

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to tell."""
        scheduler = self._scheduler
        return not (scheduler.running or scheduler.waiting or self._updates or self._events)

    @property
    def stats(self) -> LoopStats:
        """A snapshot."""
        decoder, scorer, scheduler = self._decoder, self._scorer, self._scheduler
        return LoopStats(
            running_rows=len(decoder),
            scoring_rows=len(scorer),
            running_requests=len(scheduler.running),
            waiting_requests=len(scheduler.waiting),
            batch_adapters=scheduler.batch_adapters,
            prompt_tokens=decoder.prompt_tokens,
            cached_tokens=decoder.cached_tokens,
            completion_tokens=decoder.completion_tokens,
            scored_tokens=scorer.scored_tokens,
            failures=self._failures,
            prompt_cache=self._context.prompt_cache.stats,
        )

    def submit(self, submit: Submit | Scoring) -> None:
        """Queue a request; the scheduler says in which later step it is admitted.

        Raises:
            InvalidSubmitError: its id is one that has not ended yet.
        """
        if self._scheduler.find(submit.request_id) is not None:
            raise InvalidSubmitError(f"request id {submit.request_id!r} is in use already")
        seed = submit.sampling.seed if isinstance(submit, Submit) else 0
        self._scheduler.submit(Request.of(submit, draw_seed() if seed is None else seed))

    def cancel(self, cancel: Cancel) -> None:
        """Stop a request, or one of its choices, wherever it is; one that has ended already is ignored."""
        request = self._scheduler.find(cancel.request_id)
        if request is None:
            return
        choices = set(request.open) if cancel.choice is None else request.open & {cancel.choice}
        try:
            self._side_of(request).cancel(request, choices)
        except Exception:
            if request.is_scoring:
                self._recover_scoring()
            else:
                self._recover()

    def update(self, update: Update) -> None:
        """Queue an update; updates run in this order, each before the forward of a later step."""
        self._updates.append(update)

    def fail_all(self, message: str, error: Exception) -> list[tuple[str, Event]]:
        """End every request with Failed and every queued update with `error`; returns the last events."""
        while self._updates:
            with suppress(InvalidStateError):
                self._updates.popleft().future.set_exception(error)
        self._decoder.close()
        self._fail([*self._scheduler.running.values(), *self._scheduler.waiting], message, "stopped")
        return self._take_events()

    # One turn

    def step(self) -> list[tuple[str, Event]]:
        """One turn; returns (request id, event) in the order in which things happened."""
        self._run_updates()
        self._admit()
        self._leave_room()
        work = StepWork()
        if self._decoder:
            try:
                self._break_off(self._decoder.step(work))
            except Exception:
                self._recover()
        if self._scorer:
            try:
                self._break_off(self._scorer.step(work))
            except Exception:
                self._recover_scoring()
        self._scheduler.observe(work)
        running = self._scheduler.running
        if running and not (self._decoder or self._scorer):
            _log.error("requests without rows", request_ids=list(running))
            self._fail(list(running.values()), _FAILED)
        return self._take_events()

    def _run_updates(self) -> None:
        while self._updates and not (self._updates[0].drain and self._scheduler.running):
            update = self._updates.popleft()
            error, result = None, None
            try:
                result = update.fn(self._context)
            except StopIteration as raised:  # which no awaiting caller could be given: it would wait for ever
                error = RuntimeError(f"an update raised {raised!r}")
            except BaseException as raised:
                error = raised
            with suppress(InvalidStateError):  # the thread was given up on meanwhile
                update.future.set_result(result) if error is None else update.future.set_exception(error)

    def _admit(self) -> None:
        """Start waiting requests as the scheduler says; none during a drain."""
        if self._updates or not self._scheduler.waiting:
            return
        for request in self._scheduler.admissible(self._look_up):
            try:
                self._side_of(request).start(request)
            except Exception:
                _log.exception("a request could not start", request_id=request.request_id)
                self._fail([request], _FAILED)

    def _leave_room(self) -> None:
        """Kept prompts yield to what the running requests may come to take."""
        scheduler = self._scheduler
        limit_bytes = scheduler.memory.limit_bytes
        if limit_bytes is not None:
            needed = scheduler.memory.needed_bytes(scheduler.taken_rows, scheduler.longest_tokens)
            self._context.prompt_cache.leave_room(limit_bytes - needed)

    def _look_up(self, request: Request) -> PromptMatch:
        request.key = self._context.cache_key(request.submit.row, request.submit.cache_owner)
        return self._context.prompt_cache.match(request.key, request.text)

    def _side_of(self, request: Request) -> Decoder | Scorer:
        return self._scorer if request.is_scoring else self._decoder

    def _emit(self, request: Request, event: Event) -> None:
        self._events.append((request.request_id, event))

    def _take_events(self) -> list[tuple[str, Event]]:
        events, self._events = self._events, []
        return events

    # Failures

    def _recover(self) -> None:
        """After a forward that raised: nothing in the batch can be trusted, so all of it is given up.

        Nor can caches whose evaluation may have been under way.
        """
        requests = list(self._scheduler.running.values())
        _log.exception("a step failed", request_ids=[request.request_id for request in requests])
        self._decoder.give_up()
        self._scorer.give_up()
        self._fail(requests, _FAILED)
        self._context.prompt_cache.clear()

    def _recover_scoring(self) -> None:
        """After a forward that scored and raised: what it scored is given up; what decodes goes on."""
        requests = self._scorer.give_up()
        _log.exception("scoring failed", request_ids=[request.request_id for request in requests])
        self._fail(requests, _FAILED)
        self._context.prompt_cache.clear()

    def _break_off(self, requests: list[Request]) -> None:
        """End requests whose logits are not finite; the others of the batch go on.

        Nothing is kept of what was computed with the same adapters: it may hold such numbers, too.
        """
        for request in requests:
            submit = request.submit
            step = max(request.completion_tokens.values(), default=0) + 1
            _log.error(
                "logits are not finite",
                request_id=request.request_id,
                model=submit.model,
                adapters=[(adapter.digest, weight) for adapter, weight in submit.row],
                step=step,
            )
            self._fail([request], _not_finite(submit.model, step), "not_finite")
            self._context.prompt_cache.drop(lambda key, of=request.key: key == of)

    def _fail(self, requests: list[Request], message: str, kind: FailureKind = "engine") -> None:
        self._failures += len(requests)
        for request in requests:
            self._side_of(request).forget(request)
            self._scheduler.end(request)
            self._emit(request, Failed(message, kind))


def _not_finite(model: str, step: int) -> str:
    return (
        f"the logits of {model or 'the model'!r} at token {step} are NaN or infinite, so that no token "
        "follows. Its numbers are too large for the dtype that the base is computed in; a smaller weight or "
        "scale of the adapter, or a base served with --dtype float32 or bfloat16, avoids that"
    )

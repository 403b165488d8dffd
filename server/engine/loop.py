"""Continuous batching of requests over one routed model: pure and synchronous.

Each `step` reads: run updates → admit requests → one forward of the batch → turn what came of it into events.
Who is admitted and how much is read is for `scheduler.py` to say. Knows no threads, no event loop, no text
and no adapter names. Whoever calls it, always from the thread that owns the model, hands it messages between
two steps and carries the events away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import structlog
from mlx_lm.generate import BatchGenerator, StopSequences

from .cache_kinds import bears_padding, serves_anywhere
from .container import ModelContext
from .errors import InvalidSubmitError
from .messages import (
    Cancel,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    FinishReason,
    Scoring,
    Submit,
    Token,
    Update,
)
from .prompt_cache import PromptCacheStats, PromptMatch
from .requests import Reading, Request
from .sampling import draw_seed, make_processors, make_sampler, read_logprobs
from .scheduler import LoopOptions, Scheduler, StepWork
from .scoring import Scorer

__all__ = ["GenerationLoop", "LoopOptions", "LoopStats"]

_log = structlog.get_logger(__name__)

_FAILED = "the engine failed while it computed this request"


@dataclass(frozen=True, slots=True)
class LoopStats:
    """What is there now, and totals since the start; `completion_tokens` counts stop tokens too.

    `running_rows` decode or read a prompt; `scoring_rows` are those of answers that are scored.
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

    Rows carry their adapters at the end of their cache list; their KV caches go to the prompt cache when
    they end. An update that raises, or a request that cannot start, concerns its own caller alone. A forward
    that raises fails the requests that were in it, and the loop goes on with those that wait.
    """

    def __init__(
        self, context: ModelContext, options: LoopOptions, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._context = context
        self._options = options
        self._clock = clock  # seconds
        self._stream = mx.default_stream(mx.default_device())
        self._generator = self._new_generator()
        self._scheduler = Scheduler(options)
        self._scorer = Scorer(context, options, self._scheduler, self._emit, clock)
        self._rows: dict[int, tuple[Request, int]] = {}  # by the generator's uid: request, choice
        self._updates: deque[Update] = deque()
        self._events: list[tuple[str, Event]] = []
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._failures = 0

    def _new_generator(self) -> BatchGenerator:
        size = self._options.max_batch_size
        return BatchGenerator(
            self._context.routed,  # pyright: ignore[reportArgumentType] (it calls the model, nothing else)
            completion_batch_size=size,
            prefill_batch_size=size,  # the scheduler lets in no more prompts than are to be read together
            prefill_step_size=self._options.prefill_step_tokens,
            stream=self._stream,
        )

    # Messages

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to tell."""
        scheduler = self._scheduler
        return not (scheduler.running or scheduler.waiting or self._updates or self._events)

    @property
    def stats(self) -> LoopStats:
        """A snapshot."""
        return LoopStats(
            running_rows=len(self._rows),
            scoring_rows=len(self._scorer),
            running_requests=len(self._scheduler.running),
            waiting_requests=len(self._scheduler.waiting),
            batch_adapters=self._scheduler.batch_adapters,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            scored_tokens=self._scorer.scored_tokens,
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
        request.pending -= choices
        if request.is_scoring:
            self._cancel_answers(request, choices)
            return
        try:
            # A row that still reads the prompt for other choices goes on, though its own choice is over.
            if not request.pending:
                self._remove(request, choices)
            for choice in sorted(choices):
                self._finish_choice(request, choice, "stop")
        except Exception:
            self._recover()

    def _cancel_answers(self, request: Request, answers: set[int]) -> None:
        try:
            self._scorer.finish(request, answers)
        except Exception:
            self._recover_scoring()

    def update(self, update: Update) -> None:
        """Queue an update; updates run in this order, each before the forward of a later step."""
        self._updates.append(update)

    def fail_all(self, message: str, error: Exception) -> list[tuple[str, Event]]:
        """End every request with Failed and every queued update with `error`; returns the last events."""
        while self._updates:
            self._updates.popleft().future.set_exception(error)
        self._fail([*self._scheduler.running.values(), *self._scheduler.waiting], message)
        self._generator.close()
        return self._take_events()

    def step(self) -> list[tuple[str, Event]]:
        """One turn; returns (request id, event) in the order in which things happened."""
        self._run_updates()
        self._admit()
        work = StepWork()
        if self._rows:
            try:
                self._generate(work)
            except Exception:
                self._recover()
        if self._scorer:
            try:
                self._scorer.step(work)
            except Exception:
                self._recover_scoring()
        self._scheduler.observe(work)
        running = self._scheduler.running
        if running and not (self._rows or self._scorer):
            _log.error("requests without rows", request_ids=list(running))
            self._fail(list(running.values()), _FAILED)
        return self._take_events()

    def _take_events(self) -> list[tuple[str, Event]]:
        events, self._events = self._events, []
        return events

    # Schedule

    def _run_updates(self) -> None:
        while self._updates and not (self._updates[0].drain and self._scheduler.running):
            update = self._updates.popleft()
            try:
                result = update.fn(self._context)
            except StopIteration as error:  # which no awaiting caller could be given: it would wait for ever
                update.future.set_exception(RuntimeError(f"an update raised {error!r}"))
            except BaseException as error:
                update.future.set_exception(error)
            else:
                update.future.set_result(result)

    def _admit(self) -> None:
        """Start waiting requests as the scheduler says; none during a drain."""
        if self._updates or not self._scheduler.waiting:
            return
        for request in self._scheduler.admissible(self._look_up):
            try:
                self._start(request)
            except Exception:
                _log.exception("a request could not start", request_id=request.request_id)
                self._generator.remove(list(request.uids.values()))
                self._fail([request], _FAILED)

    def _look_up(self, request: Request) -> PromptMatch:
        request.key = self._context.cache_key(request.submit.row)
        return self._context.prompt_cache.match(request.key, request.text)

    def _start(self, request: Request) -> None:
        if request.is_scoring:
            self._scorer.start(request)
            return
        prompt = list(request.submit.prompt_tokens)
        branch = self._look_up(request).branch_tokens
        kv_caches, cached = self._context.prompt_cache.fetch(request.key, request.text)
        request.cached_tokens = cached
        self._scheduler.start(request, len(prompt) - cached)
        self._prompt_tokens += len(prompt)
        self._cached_tokens += cached
        first, *others = sorted(request.open)
        segments = [prompt[cached:-1]]
        if branch - cached >= self._options.keep_prompt_tokens:
            segments = [prompt[cached:branch], prompt[branch:-1]]
        segments = [segment for segment in segments if segment]
        if others and segments:
            # The prompt is read once: the others start from the first one's caches, one token before its end.
            request.pending = set(others)
            others = []
        self._insert(request, [first, *others], prompt[:cached], segments, kv_caches)

    def _insert(
        self,
        request: Request,
        choices: list[int],
        done: list[int],
        segments: list[list[int]],
        kv_caches: list[Any] | None,
    ) -> None:
        """Put rows for `choices` into the batch; `kv_caches` hold the tokens `done`.

        `segments` are to be read, then the prompt's last token. The caches are shared between the rows:
        merging them into a batch copies, and changes none.
        """
        submit, routed = request.generated, self._context.routed
        prompt_tokens, last = len(submit.prompt_tokens), submit.prompt_tokens[-1]
        stop = StopSequences([[token] for token in submit.stop_token_ids])
        caches = [
            routed.new_cache(submit.row) if kv_caches is None else routed.with_row(kv_caches, submit.row)
            for _ in choices
        ]
        uids = self._generator.insert_segments(
            segments=[[*segments, [last]] for _ in choices],
            max_tokens=[submit.max_tokens for _ in choices],
            caches=caches,
            all_tokens=[list(done) for _ in choices],
            samplers=[make_sampler(submit.sampling, request.seed, choice) for choice in choices],
            logits_processors=[make_processors(submit.sampling, prompt_tokens) for _ in choices],
            stop_sequences=[stop for _ in choices],
        )
        for uid, choice in zip(uids, choices, strict=True):  # before all that may raise: these rows are there
            request.uids[choice] = uid
            self._rows[uid] = (request, choice)
        if segments:
            for uid in uids:
                self._scheduler.reading[uid] = Reading(
                    request,
                    position=len(done),
                    segments=[len(segment) for segment in segments],
                    kept=self._context.prompt_cache.enabled,
                    anywhere=serves_anywhere(caches[0]),
                    padded=bears_padding(caches[0]),
                )

    # Forward

    def _generate(self, work: StepWork) -> None:
        """One step of the batch: its rows decode a token, then some of the prompts' tokens are read."""
        scheduler = self._scheduler
        decoding = scheduler.decoding_rows
        step_tokens = self._generator.prefill_step_size = scheduler.step_tokens()
        lengths = [min(reading.left_tokens, step_tokens) for reading in scheduler.reading.values()]
        started = self._clock()
        prompts, responses = self._generator.next()
        seconds = self._clock() - started
        read_tokens = len(lengths) * max(lengths, default=0)
        if decoding == len(responses):  # rows that begin to decode in a step take time of their own
            work.seconds, work.decoded_rows, work.read_tokens = seconds, decoding, read_tokens
        self._process_prompts(prompts, step_tokens)
        self._process_tokens(responses)

    # Process

    def _process_prompts(self, prompts: Iterable[Any], step_tokens: int) -> None:
        """Note how far prompts have been read; keep their caches, and start choices, that waited for that."""
        for response in prompts:
            reading = self._scheduler.reading.get(response.uid)
            if reading is None:
                continue
            ended = reading.advance(min(reading.left_tokens, step_tokens))
            if not reading.segments:
                del self._scheduler.reading[response.uid]
            request, reader = self._rows[response.uid]
            starts = not reading.segments and bool(request.pending)
            if not (starts or self._worth_keeping(reading, ended)):
                continue
            cache, tokens = self._generator.extract_cache([response.uid])[response.uid]
            kv_caches = self._context.routed.strip(cache)
            mx.eval([entry.state for entry in kv_caches])
            self._context.prompt_cache.store(request.key, tokens, kv_caches)
            if starts:
                choices, request.pending = sorted(request.pending), set()
                self._insert(request, choices, list(tokens), [], kv_caches)
                if reader not in request.open:
                    self._remove(request, {reader})

    def _worth_keeping(self, reading: Reading, ended: bool) -> bool:
        """Whether to keep a prompt's caches before its answer has ended: copying them is not free."""
        if not self._context.prompt_cache.enabled:
            return False
        if reading.wanted is not None and reading.wanted <= reading.position:
            reading.wanted = None
            return True
        read_tokens = reading.position - reading.request.cached_tokens
        return ended and read_tokens >= self._options.keep_prompt_tokens

    def _process_tokens(self, responses: list[Any]) -> None:
        self._completion_tokens += len(responses)
        logprobs = self._read_logprobs(responses)
        for response in responses:
            request, choice = self._rows[response.uid]
            request.completion_tokens[choice] = request.completion_tokens.get(choice, 0) + 1
            self._scheduler.waiting.charge_output(request.share, 1)
            if response.finish_reason != "stop":
                logprob, top = logprobs.get(response.uid, (None, ()))
                self._emit(request, Token(choice, response.token, logprob, top))
            if response.finish_reason is not None:
                self._store(request, response.all_tokens, response.prompt_cache)
                self._forget_row(request, choice)
                self._finish_choice(request, choice, response.finish_reason)

    def _read_logprobs(self, responses: list[Any]) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        wanted = []
        for response in responses:
            k = self._rows[response.uid][0].generated.sampling.top_logprobs
            if k is not None and response.finish_reason != "stop":
                wanted.append((response.uid, (response.logprobs, response.token, k)))
        if not wanted:
            return {}
        uids, rows = zip(*wanted, strict=True)
        return dict(zip(uids, read_logprobs(rows), strict=True))

    def _finish_choice(self, request: Request, choice: int, reason: FinishReason) -> None:
        request.open.discard(choice)
        self._emit(request, ChoiceFinished(choice, reason, request.completion_tokens.get(choice, 0)))
        if request.open:
            return
        self._remove(request, set(request.uids))
        self._scheduler.end(request)
        self._emit(request, Finished(request.cached_tokens))

    def _remove(self, request: Request, choices: set[int]) -> None:
        """Take the rows of `choices` out of the batch; what they have computed is kept for later prompts."""
        uids = [request.uids[choice] for choice in choices if choice in request.uids]
        if not uids:
            return
        found = self._generator.remove(uids, return_prompt_caches=self._context.prompt_cache.enabled)
        for cache, tokens in found.values():
            self._store(request, tokens, cache)
        for choice in choices & request.uids.keys():
            self._forget_row(request, choice)

    def _forget_row(self, request: Request, choice: int) -> None:
        uid = request.uids.pop(choice)
        del self._rows[uid]
        self._scheduler.reading.pop(uid, None)

    def _store(self, request: Request, tokens: list[int], cache: list[Any]) -> None:
        self._context.prompt_cache.store(request.key, tokens, self._context.routed.strip(cache))

    def _recover(self) -> None:
        """After a forward that raised: nothing in the batch can be trusted, so all of it is given up.

        Nor can caches whose evaluation may have been under way.
        """
        requests = list(self._scheduler.running.values())
        _log.exception("a step failed", request_ids=[request.request_id for request in requests])
        self._failures += 1
        self._scorer.give_up()
        self._fail(requests, _FAILED)
        self._context.prompt_cache.clear()
        self._generator.close()
        self._generator = self._new_generator()

    def _recover_scoring(self) -> None:
        """After a forward that scored and raised: what it scored is given up; what decodes goes on."""
        requests = self._scorer.give_up()
        _log.exception("scoring failed", request_ids=[request.request_id for request in requests])
        self._failures += 1
        self._fail(requests, _FAILED)
        self._context.prompt_cache.clear()

    def _fail(self, requests: list[Request], message: str) -> None:
        for request in requests:
            for uid in request.uids.values():
                self._rows.pop(uid, None)
                self._scheduler.reading.pop(uid, None)
            if request.is_scoring:
                self._scorer.forget(request)
            self._scheduler.end(request)
            self._emit(request, Failed(message))

    def _emit(self, request: Request, event: Event) -> None:
        self._events.append((request.request_id, event))

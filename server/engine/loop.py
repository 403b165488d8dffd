"""Continuous batching of requests over one routed model: pure and synchronous.

Each `step` reads: run updates → admit requests → one forward of the batch → turn what came of it into events.
Knows no threads, no event loop, no text and no adapter names. Whoever calls it, always from the thread that
owns the model, hands it messages between two steps and carries the events away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import structlog
from mlx_lm.generate import BatchGenerator, StopSequences

from .container import ModelContext
from .errors import InvalidSubmitError
from .messages import (
    Cancel,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    FinishReason,
    Submit,
    Token,
    Update,
)
from .prompt_cache import PromptCacheStats
from .sampling import draw_seed, make_processors, make_sampler, read_logprobs

__all__ = ["GenerationLoop", "LoopOptions", "LoopStats"]

_log = structlog.get_logger(__name__)

_FAILED = "the engine failed while it computed this request"


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """`max_batch_size` rows decode together; `prefill_batch_size` prompts are read together.

    A prompt is read `prefill_step_tokens` at a time, with one decoding step of the others in between.
    """

    max_batch_size: int = 32
    prefill_batch_size: int = 8
    prefill_step_tokens: int = 512


@dataclass(frozen=True, slots=True)
class LoopStats:
    """What is there now, and totals since the start; `completion_tokens` counts stop tokens too."""

    running_rows: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    failures: int = 0
    prompt_cache: PromptCacheStats = field(default_factory=PromptCacheStats)


@dataclass(slots=True, eq=False)
class _Request:
    """A request from its Submit to its end.

    `open`: choices that are not finished. `pending`: those of them that wait while another choice's row reads
    the prompt for all. `uids`: the generator's rows by choice.
    """

    submit: Submit
    seed: int
    key: Hashable = None
    cached_tokens: int = 0
    open: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    uids: dict[int, int] = field(default_factory=dict)
    completion_tokens: dict[int, int] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        return self.submit.request_id


class GenerationLoop:
    """Every Submit ends in exactly one Finished or Failed, after which nothing more is said about it.

    Rows carry their adapters at the end of their cache list; their KV caches go to the prompt cache when
    they end. An update that raises, or a request that cannot start, concerns its own caller alone. A forward
    that raises fails the requests in the batch, and the loop goes on with those that wait.
    """

    def __init__(self, context: ModelContext, options: LoopOptions) -> None:
        self._context = context
        self._options = options
        self._stream = mx.default_stream(mx.default_device())
        self._generator = self._new_generator()
        self._waiting: deque[_Request] = deque()
        self._active: dict[str, _Request] = {}
        self._rows: dict[int, tuple[_Request, int]] = {}  # by the generator's uid: request, choice
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
            prefill_batch_size=min(self._options.prefill_batch_size, size),
            prefill_step_size=self._options.prefill_step_tokens,
            stream=self._stream,
        )

    # Messages

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to tell."""
        return not (self._active or self._waiting or self._updates or self._events)

    @property
    def stats(self) -> LoopStats:
        """A snapshot."""
        return LoopStats(
            running_rows=len(self._rows),
            running_requests=len(self._active),
            waiting_requests=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            failures=self._failures,
            prompt_cache=self._context.prompt_cache.stats,
        )

    def submit(self, submit: Submit) -> None:
        """Queue a request; it is admitted in a later step, first come, first served.

        Raises:
            InvalidSubmitError: its id is one that has not ended yet.
        """
        if self._find(submit.request_id) is not None:
            raise InvalidSubmitError(f"request id {submit.request_id!r} is in use already")
        seed = submit.sampling.seed
        request = _Request(submit, draw_seed() if seed is None else seed, open=set(range(submit.choices)))
        self._waiting.append(request)

    def cancel(self, cancel: Cancel) -> None:
        """Stop a request, or one of its choices, wherever it is; one that has ended already is ignored."""
        request = self._find(cancel.request_id)
        if request is None:
            return
        choices = set(request.open) if cancel.choice is None else request.open & {cancel.choice}
        request.pending -= choices
        try:
            # A row that still reads the prompt for other choices goes on, though its own choice is over.
            if not request.pending:
                self._remove(request, choices)
            for choice in sorted(choices):
                self._finish_choice(request, choice, "stop")
        except Exception:
            self._recover()

    def update(self, update: Update) -> None:
        """Queue an update; updates run in this order, each before the forward of a later step."""
        self._updates.append(update)

    def fail_all(self, message: str, error: Exception) -> list[tuple[str, Event]]:
        """End every request with Failed and every queued update with `error`; returns the last events."""
        while self._updates:
            self._updates.popleft().future.set_exception(error)
        requests = [*self._active.values(), *self._waiting]
        self._waiting.clear()
        self._fail(requests, message)
        self._generator.close()
        return self._take_events()

    def step(self) -> list[tuple[str, Event]]:
        """One turn; returns (request id, event) in the order in which things happened."""
        self._run_updates()
        self._admit()
        if self._rows:
            try:
                prompts, responses = self._generator.next()
                self._process_prompts(prompts)
                self._process_tokens(responses)
            except Exception:
                self._recover()
        if not self._rows and self._active:
            _log.error("requests without rows", request_ids=list(self._active))
            self._fail(list(self._active.values()), _FAILED)
        return self._take_events()

    def _take_events(self) -> list[tuple[str, Event]]:
        events, self._events = self._events, []
        return events

    def _find(self, request_id: str) -> _Request | None:
        found = self._active.get(request_id)
        if found is not None:
            return found
        return next((request for request in self._waiting if request.request_id == request_id), None)

    # Schedule

    def _run_updates(self) -> None:
        while self._updates and not (self._updates[0].drain and self._active):
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
        """Start waiting requests while their rows fit; none overtakes another, none starts during a drain.

        A request of more choices than rows starts on an empty batch; the generator queues the excess.
        """
        while self._waiting and not self._updates:
            choices = len(self._waiting[0].open)
            taken = sum(len(request.open) for request in self._active.values())
            if self._active and taken + choices > self._options.max_batch_size:
                return
            request = self._waiting.popleft()
            self._active[request.request_id] = request
            try:
                self._start(request)
            except Exception:
                _log.exception("a request could not start", request_id=request.request_id)
                self._fail([request], _FAILED)

    def _start(self, request: _Request) -> None:
        prompt = list(request.submit.prompt_tokens)
        request.key = self._context.cache_key(request.submit.row)
        kv_caches, cached = self._context.prompt_cache.fetch(request.key, prompt)
        request.cached_tokens = cached
        first, *others = sorted(request.open)
        left = prompt[cached:]
        if others and len(left) > 1:
            # The prompt is read once: the others start from the first one's caches, one token before its end.
            request.pending = set(others)
            others = []
        self._insert(request, [first, *others], prompt[:cached], left, kv_caches)
        self._prompt_tokens += len(prompt)
        self._cached_tokens += cached

    def _insert(
        self,
        request: _Request,
        choices: list[int],
        done: list[int],
        left: list[int],
        kv_caches: list[Any] | None,
    ) -> None:
        """Put rows for `choices` into the batch; `kv_caches` hold the tokens `done`, `left` are to be read.

        The caches are shared between the rows: merging them into a batch copies, and changes none.
        """
        submit, routed = request.submit, self._context.routed
        prompt_tokens = len(submit.prompt_tokens)
        stop = StopSequences([[token] for token in submit.stop_token_ids])
        caches = [
            routed.new_cache(submit.row) if kv_caches is None else routed.with_row(kv_caches, submit.row)
            for _ in choices
        ]
        uids = self._generator.insert_segments(
            segments=[[left[:-1], left[-1:]] for _ in choices],
            max_tokens=[submit.max_tokens for _ in choices],
            caches=caches,
            all_tokens=[list(done) for _ in choices],
            samplers=[make_sampler(submit.sampling, request.seed, choice) for choice in choices],
            logits_processors=[make_processors(submit.sampling, prompt_tokens) for _ in choices],
            stop_sequences=[stop for _ in choices],
        )
        for uid, choice in zip(uids, choices, strict=True):
            request.uids[choice] = uid
            self._rows[uid] = (request, choice)

    # Process

    def _process_prompts(self, prompts: Iterable[Any]) -> None:
        """Start the choices that waited for a prompt which has now been read up to its last token."""
        for response in prompts:
            if not response.end_of_segment or response.end_of_prompt or response.uid not in self._rows:
                continue
            request, reader = self._rows[response.uid]
            if not request.pending:
                continue
            cache, tokens = self._generator.extract_cache([response.uid])[response.uid]
            kv_caches = self._context.routed.strip(cache)
            mx.eval([entry.state for entry in kv_caches])
            choices, request.pending = sorted(request.pending), set()
            self._insert(request, choices, tokens, [request.submit.prompt_tokens[-1]], kv_caches)
            if reader not in request.open:
                self._remove(request, {reader})

    def _process_tokens(self, responses: list[Any]) -> None:
        self._completion_tokens += len(responses)
        logprobs = self._read_logprobs(responses)
        for response in responses:
            request, choice = self._rows[response.uid]
            request.completion_tokens[choice] = request.completion_tokens.get(choice, 0) + 1
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
            k = self._rows[response.uid][0].submit.sampling.top_logprobs
            if k is not None and response.finish_reason != "stop":
                wanted.append((response.uid, (response.logprobs, response.token, k)))
        if not wanted:
            return {}
        uids, rows = zip(*wanted, strict=True)
        return dict(zip(uids, read_logprobs(rows), strict=True))

    def _finish_choice(self, request: _Request, choice: int, reason: FinishReason) -> None:
        request.open.discard(choice)
        self._emit(request, ChoiceFinished(choice, reason, request.completion_tokens.get(choice, 0)))
        if request.open:
            return
        self._remove(request, set(request.uids))
        if self._active.pop(request.request_id, None) is None:
            self._waiting.remove(request)
        self._emit(request, Finished(request.cached_tokens))

    def _remove(self, request: _Request, choices: set[int]) -> None:
        """Take the rows of `choices` out of the batch; what they have computed is kept for later prompts."""
        uids = [request.uids[choice] for choice in choices if choice in request.uids]
        if not uids:
            return
        found = self._generator.remove(uids, return_prompt_caches=self._context.prompt_cache.enabled)
        for cache, tokens in found.values():
            self._store(request, tokens, cache)
        for choice in choices & request.uids.keys():
            self._forget_row(request, choice)

    def _forget_row(self, request: _Request, choice: int) -> None:
        del self._rows[request.uids.pop(choice)]

    def _store(self, request: _Request, tokens: list[int], cache: list[Any]) -> None:
        self._context.prompt_cache.store(request.key, tokens, self._context.routed.strip(cache))

    def _recover(self) -> None:
        """After a forward that raised: nothing in the batch can be trusted, so all of it is given up.

        Nor can caches whose evaluation may have been under way.
        """
        requests = list(self._active.values())
        _log.exception("a step failed", request_ids=[request.request_id for request in requests])
        self._failures += 1
        self._fail(requests, _FAILED)
        self._context.prompt_cache.clear()
        self._generator.close()
        self._generator = self._new_generator()

    def _fail(self, requests: list[_Request], message: str) -> None:
        for request in requests:
            for uid in request.uids.values():
                self._rows.pop(uid, None)
            self._active.pop(request.request_id, None)
            self._emit(request, Failed(message))

    def _emit(self, request: _Request, event: Event) -> None:
        self._events.append((request.request_id, event))

"""The asynchronous face of the generation thread: start, stop, generate, and how it is doing.

Everything here runs on one event loop, which the thread only ever reaches through `call_soon_threadsafe`; so
nothing is locked. Knows no HTTP, no text and no adapter names.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Callable
from itertools import accumulate
from types import TracebackType
from typing import Self

import structlog

from .container import ModelContainer
from .ends import RecentEnds
from .errors import (
    EngineError,
    EngineMemoryError,
    EngineOverloadedError,
    EngineStoppedError,
    InvalidSubmitError,
)
from .loop import LoopOptions, LoopStats
from .messages import (
    SMALLEST_REPETITION_PENALTY,
    Cancel,
    Event,
    Failed,
    Finished,
    Message,
    Scoring,
    Stop,
    Submit,
    Update,
)
from .model import LoadedModel, ModelInfo
from .worker import STOPPED, GenerationThread

__all__ = ["Engine", "Generation"]

_log = structlog.get_logger(__name__)


class _Stream:
    """One request as the event loop sees it: its events on their way, and what to call when it has ended."""

    def __init__(
        self, submit: Submit | Scoring, post: Callable[[Message], None], on_end: Callable[[], None]
    ) -> None:
        self.submit = submit
        self.ended = False
        # Room for every event that the request can have, so that putting one never waits.
        self.events: asyncio.Queue[Event] = asyncio.Queue(submit.most_events)
        self._post = post
        self._on_end = on_end
        self._left = False

    def put(self, event: Event) -> None:
        self.events.put_nowait(event)
        if isinstance(event, Finished | Failed):
            self.ended = True
            try:
                self._on_end()
            except Exception:
                _log.exception("the end of a request could not be told", request_id=self.submit.request_id)

    def leave(self) -> None:
        """Nobody reads any more. Also called by the garbage collector, which may run on any thread."""
        if not self.ended and not self._left:
            self._left = True
            self._post(Cancel(self.submit.request_id))


class Generation:
    """The events of one request, in order; the last one is Finished or Failed.

    Leaving early, by `aclose`, by `async with`, or by dropping the object, cancels the request.
    """

    def __init__(self, stream: _Stream, post: Callable[[Message], None]) -> None:
        self._stream = stream
        self._post = post
        self._closed = False
        weakref.finalize(self, stream.leave).atexit = False

    @property
    def request_id(self) -> str:
        """The id that the request was submitted with."""
        return self._stream.submit.request_id

    def cancel_choice(self, choice: int) -> None:
        """Stop one choice; tokens that are under way still arrive, then its ChoiceFinished."""
        if not self._stream.ended:
            self._post(Cancel(self.request_id, choice))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._closed:
            raise StopAsyncIteration
        event = await self._stream.events.get()
        if isinstance(event, Finished | Failed):
            self._closed = True
        return event

    async def aclose(self) -> None:
        """Cancel the request unless it has ended; returns at once. Iterating is over."""
        self._closed = True
        self._stream.leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class Engine:
    """Serves one model from one thread.

    `load` runs on that thread. At most `max_waiting` requests wait for a place in the batch. A stop waits
    `grace_seconds` longer than it was given, for the step that is under way. After `stuck_seconds` without a
    sign of life the thread is stuck. `memory_limit`, asked on the thread once the model is loaded, says how
    many bytes running requests and kept prompts may take (None: any). `container` runs functions on the
    thread, from `start` to `stop`.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        options: LoopOptions,
        *,
        prompt_cache_bytes: int,
        max_waiting: int,
        grace_seconds: float = 30.0,
        memory_limit: Callable[[], int | None] = lambda: None,
        stuck_seconds: float = math.inf,
    ) -> None:
        self.container = ModelContainer(
            self._post_update, lambda: self.beat_age_seconds if self.alive else 0.0, stuck_seconds
        )
        self._load = load
        self._options = options
        self._prompt_cache_bytes = prompt_cache_bytes
        self._max_waiting = max_waiting
        self._memory_limit = memory_limit
        self._grace_seconds = grace_seconds
        self._thread: GenerationThread | None = None
        self._info: ModelInfo | None = None
        self._streams: dict[str, _Stream] = {}
        self._stats = LoopStats()
        self._stopping = False
        self._ended = asyncio.Event()
        self._died = asyncio.Event()
        self._ends = RecentEnds()

    async def start(self) -> ModelInfo:
        """Start the thread and wait until the model is loaded.

        Raises: whatever `load` raises. Cancelling the wait ends the thread as soon as the load is over.
        """
        if self._thread is not None:
            raise EngineError("an engine can be started once; make a new one")
        thread = GenerationThread(
            self._load,
            self._options,
            self._prompt_cache_bytes,
            self._memory_limit,
            self._on_report,
            self._on_ended,
        )
        self._thread = thread
        thread.start()
        try:
            info = await asyncio.shield(asyncio.wrap_future(thread.started))
        except asyncio.CancelledError:
            self._stopping = True
            thread.inbox.put(Stop(0.0))
            raise
        self._info = info
        return info

    async def stop(self, timeout_seconds: float) -> None:
        """Take no more requests, let those there are go on for `timeout_seconds`, fail the rest, end.

        Returns when the thread has ended; does nothing if it never started or has ended already.
        """
        self._stopping = True
        if self._thread is None or self._ended.is_set():
            return
        self._thread.inbox.put(Stop(timeout_seconds))
        try:
            async with asyncio.timeout(timeout_seconds + self._grace_seconds):
                await self._ended.wait()
        except TimeoutError:
            _log.error("the generation thread does not stop; it is left behind")
            self._on_ended()
        else:
            self._thread.join(timeout_seconds=1.0)

    async def stop_if_hanging(self) -> None:
        """Give the thread up, and all that waits for it, if it does not turn: nothing else would end that."""
        if self.alive and self.beat_age_seconds > self._grace_seconds:
            await self.stop(0.0)

    async def died(self) -> None:
        """Wait until the thread has ended although nothing stopped it."""
        await self._died.wait()

    @property
    def info(self) -> ModelInfo:
        """The model that is served.

        Raises:
            EngineStoppedError: it has not been loaded.
        """
        if self._info is None:
            raise EngineStoppedError("the engine has not been started")
        return self._info

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs."""
        return self._thread is not None and self._thread.alive and not self._ended.is_set()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._info is not None and self.alive and not self._stopping

    @property
    def draining(self) -> bool:
        """Whether the engine is stopping, so that what it has is finished and nothing more is taken."""
        return self._stopping and self.alive

    @property
    def beat_age_seconds(self) -> float:
        """How long ago the thread last turned; it turns twice a second when there is nothing to do."""
        return math.inf if self._thread is None else time.monotonic() - self._thread.beat_seconds

    @property
    def stats(self) -> LoopStats:
        """The loop's counters as of its last step."""
        return self._stats

    @property
    def waiting_requests(self) -> int:
        """Requests that have no place in the batch beside those that came before them."""
        rows = accumulate(stream.submit.choices for stream in self._streams.values())
        return sum(total > self._options.max_batch_size for total in rows)

    def check_room(self, choices: int) -> None:
        """Whether a request of so many choices would be taken now; cheap, and takes nothing.

        Raises:
            EngineOverloadedError: too many requests wait.
            EngineStuckError: what is computed hangs, so that none would be answered.
        """
        self.container.require_alive()
        waiting = self.waiting_requests
        rows = choices + sum(stream.submit.choices for stream in self._streams.values())
        if waiting >= self._max_waiting and rows > self._options.max_batch_size:
            raise EngineOverloadedError(waiting, self._max_waiting, self._ends.seconds_for(waiting / 2))

    def generate(self, submit: Submit, on_end: Callable[[], None] = lambda: None) -> Generation:
        """Submit a request. Call it on the event loop that `start` ran on.

        `on_end` is called exactly once, when the generation thread has done with the request: only then may
        what the request uses be given up. If this raises, the request was not taken and `on_end` is never
        called.

        Raises:
            EngineStoppedError: not started, or stopping.
            EngineOverloadedError: too many requests wait.
            EngineMemoryError: it needs more memory than all requests together may take.
            EngineStuckError: what is computed hangs.
            InvalidSubmitError: its numbers are out of range, or its id is in use.
        """
        memory = self._running_thread().memory
        check_submit(submit, self.info.vocabulary_tokens)
        self._check_id(submit.request_id)
        if not memory.fits(submit.choices, submit.most_tokens):
            needed_bytes = memory.needed_bytes(submit.choices, submit.most_tokens)
            raise EngineMemoryError(submit.choices, submit.most_tokens, needed_bytes, memory.rows_bytes or 0)
        self.check_room(submit.choices)
        return self._take(submit, on_end)

    def score(self, scoring: Scoring, on_end: Callable[[], None] = lambda: None) -> Generation:
        """Submit answers to be scored. As `generate`, but never refused for want of room.

        What is scored was generated for a request that was taken; to give that up half done would waste
        more than it spares.

        Raises:
            EngineStoppedError: not started, or stopping.
            InvalidSubmitError: tokens are missing or out of range, or its id is in use.
        """
        self._running_thread()
        check_scoring(scoring, self.info.vocabulary_tokens)
        self._check_id(scoring.request_id)
        return self._take(scoring, on_end)

    def _check_id(self, request_id: str) -> None:
        if request_id in self._streams:
            raise InvalidSubmitError(f"request id {request_id!r} is in use already")

    def _take(self, submit: Submit | Scoring, on_end: Callable[[], None]) -> Generation:
        thread = self._running_thread()
        stream = _Stream(submit, thread.inbox.put, on_end)
        if not self._streams:
            self._ends.begin()
        self._streams[submit.request_id] = stream
        thread.inbox.put(submit)
        return Generation(stream, thread.inbox.put)

    def _running_thread(self) -> GenerationThread:
        if self._thread is None or self._info is None:
            raise EngineStoppedError("the engine has not been started")
        if self._stopping or self._ended.is_set():
            raise EngineStoppedError("the engine is stopping or has stopped")
        return self._thread

    def _post_update(self, update: Update) -> None:
        self._running_thread().inbox.put(update)

    def _on_report(self, events: list[tuple[str, Event]], stats: LoopStats) -> None:
        if self._ended.is_set():  # the thread was given up on, and this comes too late
            return
        self._stats = stats
        for request_id, event in events:
            stream = self._streams[request_id]
            if isinstance(event, Finished | Failed):
                del self._streams[request_id]
                self._ends.note()
            stream.put(event)

    def _on_ended(self) -> None:
        """The thread has ended, or is given up on: whatever still waits for it is told so."""
        if self._ended.is_set():
            return
        self._ended.set()
        if not self._stopping:
            self._died.set()
        self.container.give_up(EngineStoppedError("the generation thread has ended"))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(Failed(STOPPED, "stopped"))
        self._stats = LoopStats()


def check_submit(submit: Submit, vocabulary_tokens: int) -> None:
    """Refuse a request that would read out of bounds or divide by nought.

    Raises:
        InvalidSubmitError: with the first thing that is wrong.
    """
    sampling = submit.sampling
    tokens = submit.prompt_tokens
    numbers = (sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.frequency_penalty)
    rules = (
        (len(tokens) > 0, "the prompt has no tokens"),
        (submit.max_tokens >= 1, f"max_tokens must be at least 1, got {submit.max_tokens}"),
        (submit.choices >= 1, f"choices must be at least 1, got {submit.choices}"),
        (
            len(tokens) == 0 or (min(tokens) >= 0 and max(tokens) < vocabulary_tokens),
            f"the prompt's token ids must be from 0 to {vocabulary_tokens - 1}",
        ),
        (
            all(0 <= token < vocabulary_tokens for token, _ in sampling.logit_bias),
            f"the token ids of logit_bias must be from 0 to {vocabulary_tokens - 1}",
        ),
        (all(math.isfinite(bias) for _, bias in sampling.logit_bias), "a logit bias must be a finite number"),
        (all(math.isfinite(number) for number in numbers), "sampling parameters must be finite numbers"),
        (sampling.temperature >= 0, f"temperature must not be negative, got {sampling.temperature}"),
        (0 <= sampling.min_p <= 1, f"min_p must be from 0 to 1, got {sampling.min_p}"),
        (
            SMALLEST_REPETITION_PENALTY <= sampling.repetition_penalty < math.inf,
            f"repetition_penalty must be at least {SMALLEST_REPETITION_PENALTY}, "
            f"got {sampling.repetition_penalty}",
        ),
        (
            sampling.top_logprobs is None or sampling.top_logprobs >= 0,
            f"top_logprobs must not be negative, got {sampling.top_logprobs}",
        ),
    )
    for holds, problem in rules:
        if not holds:
            raise InvalidSubmitError(problem)


def check_scoring(scoring: Scoring, vocabulary_tokens: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        InvalidSubmitError: no prompt, no answers, an empty one, or tokens that the vocabulary does not have.
    """
    texts = (scoring.prompt_tokens, *scoring.answers)
    if len(texts) < 2 or not all(texts):
        raise InvalidSubmitError("expected a prompt and at least one answer, each of at least one token")
    if min(map(min, texts)) < 0 or max(map(max, texts)) >= vocabulary_tokens:
        raise InvalidSubmitError(f"token ids must be from 0 to {vocabulary_tokens - 1}")

"""The one generation thread: loads the model, turns the loop, and carries messages in and events out.

Knows nothing of what a message means. `GenerationThread` is made and its `inbox` filled on the event loop;
everything whose name starts with `_run` is on the thread.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import mlx.core as mx
import structlog

from .context import ModelContext
from .errors import EngineStoppedError
from .kv_memory import KvMemory
from .loop import GenerationLoop, LoopOptions, LoopStats
from .messages import Cancel, Event, Message, Scoring, Stop, Submit, Update
from .model import LoadedModel, ModelInfo

__all__ = ["GenerationThread", "Report"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_IDLE_SECONDS = 0.5
STOPPED = "the engine was stopped before this request had finished"

Report = Callable[[list[tuple[str, Event]], LoopStats], None]
"""Called on the event loop, once for each step that has something to tell."""


class GenerationThread:
    """One thread with a model.

    `load` runs on it first; `started` then holds the model's description or the error that stopped it. Each
    step's events go to `report` in one call on the event loop. `ended` is called there last of all, however
    the thread ended.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        options: LoopOptions,
        prompt_cache_bytes: int,
        memory_limit: Callable[[], int | None],
        report: Report,
        ended: Callable[[], None],
    ) -> None:
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.started: Future[ModelInfo] = Future()
        self.memory = KvMemory()
        self.beat_seconds = time.monotonic()
        self._load = load
        self._options = options
        self._prompt_cache_bytes = prompt_cache_bytes
        self._memory_limit = memory_limit
        self._report = report
        self._ended = ended
        self._event_loop = asyncio.get_running_loop()
        # A daemon, so that an interrupt during a long load can end the process.
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; returns at once."""
        self._thread.start()

    def join(self, timeout_seconds: float) -> None:
        """Wait until the thread is gone, which it is soon after `ended` was called."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            loop = self._run_start()
            if loop is not None:
                self._run_turns(loop)
        finally:
            loop = None
            self._run_clean_up()
            self._tell(self._ended)

    def _run_clean_up(self) -> None:
        """Let go of the model on the thread that made its arrays, and end MLX's own threads.

        Without the second, MLX ends them behind our back and may abort the process when it exits meanwhile.
        """
        gc.collect()
        mx.clear_streams()

    def _run_start(self) -> GenerationLoop | None:
        try:
            loaded = self._load()
            self.memory = KvMemory(loaded.info.kv_sizes, self._memory_limit())
            if self.memory.limit_bytes is not None:
                _log.info("memory for requests and kept prompts", limit_bytes=self.memory.limit_bytes)
            context = ModelContext.build(loaded, self._prompt_cache_bytes)
            began = time.monotonic()
            if kernels := context.bank.warm():
                _log.info("kernels compiled", kernels=kernels, seconds=round(time.monotonic() - began, 1))
            loop = GenerationLoop(context, self._options, memory=self.memory)
            if self._options.warm:
                loop.warm(loaded.info.context_tokens)
        except BaseException as error:
            self.started.set_exception(error)
            return None
        self.beat_seconds = time.monotonic()
        self.started.set_result(loaded.info)
        return loop

    def _run_turns(self, loop: GenerationLoop) -> None:
        try:
            self._run_until_stopped(loop)
        except BaseException:
            _log.exception("the generation thread failed")
        finally:
            error = EngineStoppedError("the generation thread has ended")
            self._tell(self._report, loop.fail_all(STOPPED, error), loop.stats)

    def _run_until_stopped(self, loop: GenerationLoop) -> None:
        deadline_seconds: float | None = None
        told = loop.stats
        while deadline_seconds is None or not (loop.idle or time.monotonic() >= deadline_seconds):
            for message in self._run_receive(wait=loop.idle):
                if isinstance(message, Stop):
                    deadline_seconds = time.monotonic() + message.timeout_seconds
                else:
                    _hand_over(loop, message)
            events = loop.step()
            self.beat_seconds = time.monotonic()
            stats = loop.stats
            if events or stats != told:
                told = stats
                if not self._tell(self._report, events, stats):
                    return

    def _run_receive(self, wait: bool) -> list[Message]:
        """Everything that lies in the inbox; with `wait`, blocks for a while until there is something."""
        try:
            first = self.inbox.get(block=wait, timeout=_IDLE_SECONDS if wait else None)
        except queue.Empty:
            return []
        return [first, *_drain(self.inbox)]

    def _tell(self, callback: Callable[..., None], *args: object) -> bool:
        """Call `callback` on the event loop; False if that is closed, so that nobody listens any more."""
        try:
            self._event_loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            _log.warning("the event loop was closed before the generation thread ended")
            return False
        return True


def _hand_over(loop: GenerationLoop, message: Submit | Scoring | Cancel | Update) -> None:
    match message:
        case Submit() | Scoring():
            loop.submit(message)
        case Cancel():
            loop.cancel(message)
        case Update():
            loop.update(message)


def _drain(inbox: queue.SimpleQueue[_T]) -> list[_T]:
    messages: list[_T] = []
    while True:
        try:
            messages.append(inbox.get_nowait())
        except queue.Empty:
            return messages

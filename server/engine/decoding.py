"""Requests that generate: their rows in mlx-lm's batch generator, from their start to their events.

Prompts are read and tokens decoded in one batch; caches come from the prompt cache and go back to it. Knows
requests and the schedule; who starts when, and what a failure means for others, is the loop's. Runs on the
generation thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences

from adapters_core.mixed.routing import RowWatch

from .cache_kinds import bears_padding, serves_anywhere
from .context import ModelContext
from .messages import ChoiceFinished, Event, Finished, FinishReason, Token
from .requests import Reading, Request
from .sampling import make_processors, make_sampler, read_logprobs
from .scheduler import LoopOptions, Scheduler, StepWork

__all__ = ["Decoder"]


class _Row(NamedTuple):
    """A row of the generator's."""

    request: Request
    choice: int
    watch: RowWatch


class Decoder:
    """The running requests that generate, for one loop; `emit` takes what they have to tell.

    Rows carry their adapters at the end of their cache list; their KV caches go to the prompt cache when
    they end. A method that raises leaves a batch that cannot be trusted: then `give_up`.
    """

    def __init__(
        self,
        context: ModelContext,
        options: LoopOptions,
        scheduler: Scheduler,
        emit: Callable[[Request, Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.prompt_tokens = 0
        """Tokens of prompts that were taken, since the start; `cached_tokens` of them were not computed."""
        self.cached_tokens = 0
        self.completion_tokens = 0
        """Tokens that were generated since the start, stop tokens too."""
        self._context = context
        self._options = options
        self._scheduler = scheduler
        self._emit = emit
        self._clock = clock
        self._rows: dict[int, _Row] = {}  # by the generator's uid
        self._stream = mx.default_stream(mx.default_device())
        self._generator = self._new_generator()

    def __len__(self) -> int:
        """Rows in the batch, those whose prompt is being read included."""
        return len(self._rows)

    def _new_generator(self) -> BatchGenerator:
        size = self._options.max_batch_size
        return BatchGenerator(
            self._context.routed,  # pyright: ignore[reportArgumentType] (it calls the model, nothing else)
            completion_batch_size=size,
            prefill_batch_size=size,  # the scheduler lets in no more prompts than are to be read together
            prefill_step_size=self._options.prefill_step_tokens,
            stream=self._stream,
        )

    # Start

    def start(self, request: Request) -> None:
        """Begin with a request, which waited until now, from what is kept of its prompt."""
        prompt = list(request.submit.prompt_tokens)
        kept = self._context.prompt_cache
        branch = kept.match(request.key, request.text).branch_tokens
        kv_caches, cached = kept.fetch(request.key, request.text)
        request.cached_tokens = cached
        self._scheduler.start(request, len(prompt) - cached)
        self.prompt_tokens += len(prompt)
        self.cached_tokens += cached
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
        watches = [RowWatch() for _ in choices]
        caches = [
            routed.new_cache(submit.row, watch)
            if kv_caches is None
            else routed.with_row(kv_caches, submit.row, watch)
            for watch in watches
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
        # Before all that may raise: these rows are there.
        for uid, choice, watch in zip(uids, choices, watches, strict=True):
            request.uids[choice] = uid
            self._rows[uid] = _Row(request, choice, watch)
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

    def step(self, work: StepWork) -> list[Request]:
        """One step of the batch: its rows decode a token, then some of the prompts' tokens are read.

        Adds to the `work` that the step has done. Returns the requests whose logits are not finite, which
        the caller ends: of their tokens nothing is told.
        """
        scheduler = self._scheduler
        decoding = scheduler.decoding_rows
        step_tokens = self._generator.prefill_step_size = scheduler.step_tokens()
        lengths = [min(reading.left_tokens, step_tokens) for reading in scheduler.reading.values()]
        started = self._clock()
        prompts, responses = self._generator.next()
        # With the forward that is under way, so that the next step finds them without a wait of their own.
        mx.async_eval([logits.lazy for logits in {row.watch.last for row in self._rows.values()} if logits])
        seconds = self._clock() - started
        work.seconds, work.read_tokens = seconds, len(lengths) * max(lengths, default=0)
        work.decoded_rows, work.joined_rows = len(responses), decoding - len(responses)
        self._process_prompts(prompts, step_tokens)
        return self._process_tokens(responses)

    def _process_prompts(self, prompts: Iterable[Any], step_tokens: int) -> None:
        """Note how far prompts have been read; keep their caches, and start choices, that waited for that."""
        for response in prompts:
            reading = self._scheduler.reading.get(response.uid)
            if reading is None:
                continue
            ended = reading.advance(min(reading.left_tokens, step_tokens))
            if not reading.segments:
                del self._scheduler.reading[response.uid]
            request, reader, _ = self._rows[response.uid]
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

    def _process_tokens(self, responses: list[Any]) -> list[Request]:
        self.completion_tokens += len(responses)
        broken = [self._rows[r.uid].request for r in responses if not self._rows[r.uid].watch.was_finite]
        logprobs = self._read_logprobs(responses)
        for response in responses:
            request, choice, _ = self._rows[response.uid]
            if request in broken:
                if response.finish_reason is not None:
                    self._forget_row(request, choice)  # the generator has done so
                continue
            request.completion_tokens[choice] = request.completion_tokens.get(choice, 0) + 1
            self._scheduler.waiting.charge_output(request.share, 1)
            if response.finish_reason != "stop":
                logprob, top = logprobs.get(response.uid, (None, ()))
                self._emit(request, Token(choice, response.token, logprob, top))
            if response.finish_reason is not None:
                self._store(request, response.all_tokens, response.prompt_cache)
                self._forget_row(request, choice)
                self._finish(request, choice, response.finish_reason)
        return list(dict.fromkeys(broken))

    def _read_logprobs(self, responses: list[Any]) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        wanted = []
        for response in responses:
            k = self._rows[response.uid].request.generated.sampling.top_logprobs
            if k is not None and response.finish_reason != "stop":
                wanted.append((response.uid, (response.logprobs, response.token, k)))
        if not wanted:
            return {}
        uids, rows = zip(*wanted, strict=True)
        return dict(zip(uids, read_logprobs(rows), strict=True))

    # End

    def cancel(self, request: Request, choices: set[int]) -> None:
        """End these choices wherever they are; without any that is open, the request ends."""
        request.pending -= choices
        # A row that still reads the prompt for other choices goes on, though its own choice is over.
        if not request.pending:
            self._remove(request, choices)
        for choice in sorted(choices):
            self._finish(request, choice, "stop")

    def _finish(self, request: Request, choice: int, reason: FinishReason) -> None:
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

    def _store(self, request: Request, tokens: list[int], cache: list[Any]) -> None:
        self._context.prompt_cache.store(request.key, tokens, self._context.routed.strip(cache))

    def _forget_row(self, request: Request, choice: int) -> None:
        uid = request.uids.pop(choice)
        del self._rows[uid]
        self._scheduler.reading.pop(uid, None)

    # What the loop ends

    def forget(self, request: Request) -> None:
        """Drop the rows of a request that the caller ends; nothing that they have computed is kept."""
        if request.uids:
            self._generator.remove(list(request.uids.values()))
        for choice in list(request.uids):
            self._forget_row(request, choice)

    def give_up(self) -> None:
        """Drop all rows, of which none can be trusted, for an empty batch; the caller ends their requests."""
        self.close()
        self._generator = self._new_generator()

    def close(self) -> None:
        """Drop all rows; nothing can be computed any more."""
        for request, _, _ in self._rows.values():
            request.uids.clear()
        self._rows.clear()
        self._scheduler.reading.clear()
        self._generator.close()

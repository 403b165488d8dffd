"""Who is admitted to the batch, and how much of the prompts is read in a step.

Holds the waiting and the running requests and the prompts that are being read; decides, and computes nothing.
Knows no model and no batch: the loop asks it, does what it says, and tells it what came of it. Runs on the
generation thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adapters_core.mixed.residents import ResidentAdapter

from .fairness import FairQueue
from .kv_memory import KvMemory
from .pacing import Pace, first_read
from .prompt_cache import PromptMatch
from .requests import Reading, Request

__all__ = ["LoopOptions", "Scheduler", "StepWork"]

# How many requests may be started before one that was next and did not fit yet.
_MAX_OVERTAKEN = 32
# How many prompts that cannot be read yet are looked up in a step, for one whose caches let it start at once.
_MAX_LOOK_UPS = 8
# How many requests that wait for another's reading are passed by in a step, for later ones of their key.
_MAX_FOLLOWING = 32
_MIN_READ_TOKENS = 32
# The logits of all tokens that are scored in a step are there at once.
_MOST_SCORED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """`max_batch_size` rows decode together; at most `prefill_batch_size` prompts are read together.

    At most `prefill_step_tokens` of each prompt are read in one step; less, by what is measured, while rows
    decode and where a step would take too long.
    The running requests use at most `max_batch_adapters` different adapters (None: no limit), unless one
    alone needs more. A prompt's KV caches are kept as soon as they are read if they cover
    `keep_prompt_tokens` more than what was kept already. With `warm`, the model computes a little before the
    first request.
    """

    max_batch_size: int = 32
    prefill_batch_size: int = 32
    prefill_step_tokens: int = 2048
    max_batch_adapters: int | None = None
    keep_prompt_tokens: int = 128
    warm: bool = False


@dataclass(slots=True)
class StepWork:
    """What one step computed, padding included, and how long it took (0: not known).

    `seconds` are those of decoding and reading, `scoring_seconds` those of the scoring after that.
    `joined_rows` are those whose prompt had been read, and that begin to decode.
    """

    seconds: float = 0.0
    scoring_seconds: float = 0.0
    decoded_rows: int = 0
    joined_rows: int = 0
    read_tokens: int = 0
    scored_tokens: int = 0


class Scheduler:
    """Requests by their state: waiting, running, and those of the running ones whose prompt is being read."""

    def __init__(self, options: LoopOptions, memory: KvMemory | None = None) -> None:
        self.options = options
        self.memory = memory or KvMemory()
        self.waiting: FairQueue[Request] = FairQueue()
        self.running: dict[str, Request] = {}
        self.reading: dict[int, Reading] = {}  # by the generator's uid
        together = options.prefill_step_tokens * options.prefill_batch_size
        self.pace = Pace(min_tokens=_MIN_READ_TOKENS, max_tokens=together)
        # Scoring costs more for each token than reading: it needs the logits of all.
        self.scoring_pace = Pace(min_tokens=_MIN_READ_TOKENS, max_tokens=self._most_scored_tokens)

    @property
    def _most_scored_tokens(self) -> int:
        return min(self.options.prefill_step_tokens, _MOST_SCORED_TOKENS)

    @property
    def batch_adapters(self) -> int:
        """Different adapters of the running requests."""
        return len(self._adapters())

    def _adapters(self) -> frozenset[ResidentAdapter]:
        none: frozenset[ResidentAdapter] = frozenset()
        return none.union(*(request.adapters for request in self.running.values()))

    @property
    def taken_rows(self) -> int:
        """Rows of the running requests, those that are not in the batch yet included."""
        return sum(len(request.open) for request in self.running.values())

    @property
    def longest_tokens(self) -> int:
        """How long the rows of the running requests can get."""
        return max((request.submit.most_tokens for request in self.running.values()), default=0)

    def find(self, request_id: str) -> Request | None:
        """A request that has not ended."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    def submit(self, request: Request) -> None:
        """Let it wait."""
        self.waiting.push(request.share, request.request_id, request)

    def start(self, request: Request, read_tokens: int) -> None:
        """It runs from now on; `read_tokens` of its prompt, and of its answers, are to be computed."""
        self.waiting.start(request.request_id, read_tokens)
        self.running[request.request_id] = request

    def end(self, request: Request) -> None:
        """It has ended, wherever it was."""
        if self.running.pop(request.request_id, None) is not None:
            self.waiting.end(request.share)
        elif self.waiting.get(request.request_id) is not None:
            self.waiting.remove(request.request_id)

    def admissible(self, look_up: Callable[[Request], PromptMatch]) -> Iterator[Request]:
        """Those that may start now, one by one: the caller starts, or ends, each before it asks for the next.

        `look_up` sets a request's key and says what is kept for its prompt. The order is that of fairness.
        Where rows are wanting, nobody overtakes. A request that must wait for other reasons may be overtaken
        by those that fit, a bounded number of times; then they wait for it. One that only waits for what
        another is reading holds up nobody. Where memory is wanting, nobody overtakes either.
        """
        passed: list[Request] = []
        following: set[str] = set()
        looked_up = 0
        taken, present = self.taken_rows, self._adapters()
        for request in self.waiting.heads(following):
            if self.running and taken + len(request.open) > self.options.max_batch_size:
                return
            longest = max(self.longest_tokens, request.submit.most_tokens)
            if self.running and not self.memory.fits(taken + len(request.open), longest):
                return
            fits = self._adapters_fit(request, present)
            if fits:
                cached = look_up(request).cached_tokens
                if self._follows(request, cached):
                    # What it waits for is no more than what it would have to read itself.
                    if len(following) < _MAX_FOLLOWING:
                        following.add(request.request_id)
                    continue
                looked_up += 1
                fits = self._may_read(request, len(request.submit.prompt_tokens) - 1 - cached)
            if fits:
                yield request
                taken, present, looked_up = self.taken_rows, self._adapters(), 0
                for other in passed:
                    other.overtaken += 1
            else:
                passed.append(request)
            if looked_up > _MAX_LOOK_UPS or any(other.overtaken >= _MAX_OVERTAKEN for other in passed):
                return

    def _adapters_fit(self, request: Request, present: frozenset[ResidentAdapter]) -> bool:
        limit = self.options.max_batch_adapters
        if limit is None or request.adapters <= present or present <= request.adapters:
            return True
        return len(present | request.adapters) <= limit

    def _follows(self, request: Request, cached_tokens: int) -> bool:
        """Whether a prompt that is being read now will soon have read what this one needs too.

        Not one that has yet to read what is cached for this one: that would be a longer wait than its own.
        """
        for reading in self.reading.values():
            if reading.request.key != request.key or reading.position < cached_tokens:
                continue
            served = reading.will_serve(request.text)
            if served > reading.position and served - cached_tokens >= self.options.keep_prompt_tokens:
                reading.wanted = served if reading.wanted is None else min(served, reading.wanted)
                return True
        return False

    def _may_read(self, request: Request, left_tokens: int) -> bool:
        """Whether a prompt of which so much is to be read may be read beside the others.

        Not if that spreads the step's budget too thin; but a share of which nothing is read may always.
        """
        reading = self.reading.values()
        if left_tokens <= 0 or request.is_scoring:
            return True
        rests = self.pace.rests and self.decoding_rows > 0 and not reading
        if rests or len(reading) >= self.options.prefill_batch_size:
            return False
        left = [left_tokens, *(other.left_tokens for other in reading)]
        budget = self._budget_tokens(left)
        if not reading or len(left) * max(left) <= budget:
            return True
        is_new = all(other.request.share != request.share for other in reading)
        return is_new and budget // len(left) >= min(left_tokens, _MIN_READ_TOKENS)

    @property
    def decoding_rows(self) -> int:
        """Rows in the batch whose prompt has been read."""
        return sum(len(request.uids) for request in self.running.values()) - len(self.reading)

    def _budget_tokens(self, left_tokens: list[int]) -> int:
        if self.decoding_rows == 0:
            budget = self.pace.idle_tokens
        else:
            budget = self.pace.budget_tokens(left_tokens, self.decoding_rows)
            budget = max(1, budget // 2) if self.is_scoring else budget
        most = self.memory.most_read_tokens(self.longest_tokens)
        return budget if most is None else min(budget, most)

    @property
    def is_scoring(self) -> bool:
        """Whether answers are being scored."""
        return any(request.is_scoring for request in self.running.values())

    def scored_tokens(self) -> int:
        """How many tokens of answers, their prompts and padding together, to score in the next step.

        As much as is read of prompts; where both is done in a step, each has half of the time. Never more
        than one prompt's share of a step, since the logits of all these tokens are there at once.
        """
        if self.decoding_rows == 0:
            budget = self._most_scored_tokens
        else:
            budget = self.scoring_pace.budget_tokens((), self.decoding_rows)
            budget = max(1, budget // 2) if self.reading else budget
        most = self.memory.most_scored_tokens(self.longest_tokens)
        return budget if most is None else min(budget, most)

    def observe(self, work: StepWork) -> None:
        """Learn from a step. What one forward leaves to be computed is waited for in the next one's time."""
        decoded, read, scored = work.decoded_rows, work.read_tokens, work.scored_tokens
        if read or not scored:
            self.pace.observe(
                work.seconds,
                decoded_rows=decoded,
                read_tokens=read,
                waiting_rows=len(self.reading) + len(self.waiting),
                joined=work.joined_rows > 0,
            )
        if not read:
            seconds = work.seconds + work.scoring_seconds
            self.scoring_pace.observe(seconds, decoded_rows=decoded, read_tokens=scored)
        elif scored:
            self.scoring_pace.observe(work.scoring_seconds, decoded_rows=0, read_tokens=scored)

    def step_tokens(self) -> int:
        """How many tokens of each prompt to read in the next step; at least 1."""
        options, reading = self.options, self.reading.values()
        if not reading:
            return options.prefill_step_tokens
        left = [one.left_tokens for one in reading]
        step_tokens = first_read(
            left, self._budget_tokens(left), options.prefill_step_tokens, self.pace.forward_tokens
        )
        return step_tokens if all(one.padded for one in reading) else min(step_tokens, *left)

"""Any sequence of requests, cancellations, updates and failures: one end each, and the right tokens."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import RowAdapters, make_row, row_key
from server.engine.context import ModelContext
from server.engine.errors import EngineStoppedError
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.messages import (
    Cancel,
    ChoiceFinished,
    Failed,
    Finished,
    SamplingParams,
    Scored,
    Scoring,
    Submit,
    Update,
)
from tests.engine.support import Poisoned, Transcript, make_context, submit
from tests.models import make_adapter, tiny_llama

POISON = Poisoned.token
# Nobody generates the poison by chance.
MUTE = SamplingParams(temperature=0.0, logit_bias=((POISON, -1e9),))
MODEL = tiny_llama()
LONG = list(range(40))
NAMES = ("", "a", "b", "c", "ab", "abc")
ADAPTERS_AT_MOST = 2


class LoopMachine(RuleBasedStateMachine):
    """What callers do, in any order; the transcript checks that nothing follows an end."""

    def __init__(self) -> None:
        super().__init__()
        context = make_context(tiny_llama())
        self.rows = make_rows(context)
        context.routed.model = Poisoned(context.model)
        self.turns = count()
        options = LoopOptions(
            max_batch_size=4,
            prefill_batch_size=2,
            prefill_step_tokens=8,
            max_batch_adapters=ADAPTERS_AT_MOST,
            keep_prompt_tokens=6,
        )
        self.loop = GenerationLoop(context, options, lambda: next(self.turns) ** 1.5)
        self.transcript = Transcript()
        self.submits: dict[str, Submit | Scoring] = {}
        self.futures: list[Future[Any]] = []
        self.ran: list[int] = []
        self.poisoned = False
        self.cancelled: set[str] = set()

    # Prompts share beginnings, so that caches are hit at every length.
    @rule(
        adapters=st.sampled_from(NAMES),
        start=st.integers(0, 2),
        length=st.integers(1, 35),
        max_tokens=st.integers(1, 5),
        choices=st.integers(1, 6),
        stop=st.frozensets(st.integers(0, 94), max_size=20),
    )
    def submit_one(
        self, adapters: str, start: int, length: int, max_tokens: int, choices: int, stop: frozenset[int]
    ) -> None:
        name = f"r{len(self.submits)}"
        self.submits[name] = submit(
            name,
            LONG[start : start + length],
            max_tokens,
            choices=choices,
            stop_token_ids=stop,
            sampling=MUTE,
            row=self.rows[adapters],
        )
        self.loop.submit(self.submits[name])

    @rule(
        adapters=st.sampled_from(NAMES),
        start=st.integers(0, 2),
        length=st.integers(1, 20),
        answers=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 19)), min_size=1, max_size=6),
        poisoned=st.sampled_from([False] * 9 + [True]),
    )
    def score_one(
        self, adapters: str, start: int, length: int, answers: list[tuple[int, int]], poisoned: bool
    ) -> None:
        name = f"r{len(self.submits)}"
        texts = [tuple(LONG[first : first + tokens]) for first, tokens in answers]
        if poisoned:
            self.poisoned = True
            texts[0] += (POISON, 1)
        self.submits[name] = Scoring(
            name, self.rows[adapters], tuple(LONG[start : start + length]), tuple(texts)
        )
        self.loop.submit(self.submits[name])

    @precondition(lambda self: not self.poisoned)
    @rule(length=st.integers(0, 20))
    def submit_poison(self, length: int) -> None:
        self.poisoned = True
        name = f"r{len(self.submits)}"
        self.submits[name] = submit(name, [*LONG[:length], POISON], 2)
        self.loop.submit(self.submits[name])

    @precondition(lambda self: self.submits)
    @rule(which=st.integers(0, 10), choice=st.none() | st.integers(0, 6))
    def cancel(self, which: int, choice: int | None) -> None:
        name = list(self.submits)[-1 - which % len(self.submits)]
        self.cancelled.add(name)
        self.loop.cancel(Cancel(name, choice))

    @rule(drain=st.booleans(), fails=st.booleans())
    def update(self, drain: bool, fails: bool) -> None:
        number = len(self.futures)
        future: Future[Any] = Future()
        self.futures.append(future)

        def run(context: Any) -> None:
            self.ran.append(number)
            if drain:
                assert self.loop.stats.running_rows == self.loop.stats.scoring_rows == 0
            if fails:
                raise ValueError(number)

        self.loop.update(Update(run, future, drain))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.transcript.add(self.loop.step())

    @invariant()
    def rows_are_bounded(self) -> None:
        # Six choices on an empty batch of four are the one exception.
        assert self.loop.stats.running_rows <= 6

    @invariant()
    def adapters_are_bounded(self) -> None:
        # A blend of three, in the company of its own adapters, is the one exception.
        assert self.loop.stats.batch_adapters <= 3

    def teardown(self) -> None:
        while not self.loop.idle:
            self.transcript.add(self.loop.step())
        assert self.loop.stats.running_rows == self.loop.stats.scoring_rows == 0
        assert self.ran == list(range(len(self.futures)))
        assert all(future.done() for future in self.futures)
        for name, sent in self.submits.items():
            assert self.transcript.ended(name)
            end = self.transcript.end(name)
            if isinstance(end, Finished):
                if isinstance(sent, Scoring):
                    self.check_scores(name, sent)
                else:
                    self.check_answer(name, sent)
            else:
                assert self.poisoned
                assert isinstance(end, Failed)
        self.loop.fail_all("over", EngineStoppedError("over"))

    def check_scores(self, name: str, sent: Scoring) -> None:
        """Right are all that came; only those of a cancelled request may not have come."""
        events = [event for event in self.transcript.events[name] if isinstance(event, Scored)]
        assert len({event.answer for event in events}) == len(events)
        assert len(events) == len(sent.answers) or name in self.cancelled
        for event in events:
            expected = expected_scores(row_key(sent.row), sent.prompt_tokens, sent.answers[event.answer])
            assert np.allclose(event.logprobs, expected, atol=1e-4)

    def check_answer(self, name: str, sent: Submit) -> None:
        expected = expected_tokens(sent.row, sent.prompt_tokens)[: sent.max_tokens]
        stopped = next((at for at, token in enumerate(expected) if token in sent.stop_token_ids), None)
        for choice in range(sent.choices):
            tokens = self.transcript.tokens(name, choice)
            end = self.transcript.finish(name, choice)
            if end == ChoiceFinished(choice, "length", sent.max_tokens):
                assert tokens == expected
                assert stopped is None
            elif stopped is not None and end.completion_tokens == stopped + 1:
                assert tokens == expected[:stopped]
            else:  # cancelled
                assert end == ChoiceFinished(choice, "stop", len(tokens))
                assert tokens == expected[: len(tokens)]


def make_rows(context: ModelContext) -> dict[str, RowAdapters]:
    """The rows of NAMES; a blend has each of its adapters at half its weight."""
    residents = {name: context.bank.add(context.bank.prepare(CONTAINERS[name])) for name in "abc"}
    return {
        names: make_row((residents[name], 1.0 if len(names) == 1 else 0.5) for name in names)
        for names in NAMES
    }


def make_containers() -> dict[str, AdapterContainer]:
    with TemporaryDirectory() as folder:
        return {
            name: AdapterContainer.from_directory(
                make_adapter(Path(folder) / name, MODEL, "lora", seed=seed, rank=2)
            )
            for seed, name in enumerate("abc")
        }


CONTAINERS = make_containers()
ALONE = make_context(MODEL, prompt_cache_bytes=0)
ROWS_ALONE = {row_key(row): row for row in make_rows(ALONE).values()}


@cache
def expected_of_key(key: Hashable, prompt: tuple[int, ...]) -> list[int]:
    """Five tokens of a prompt alone, read in one go, by a model whose cache has one row."""
    row = next(row for row in ROWS_ALONE.values() if row_key(row) == key)
    caches = [entry.merge([entry]) for entry in ALONE.routed.new_cache(row)]
    read, tokens = list(prompt), list[int]()
    for _ in range(5):
        logits = ALONE.routed(mx.array([read]), cache=caches)[0, -1]
        logits[POISON] -= 1e9
        read = [int(np.argmax(np.array(logits)))]
        tokens += read
    return tokens


@cache
def expected_scores(key: Hashable, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
    """Log-probabilities of an answer alone, read in one go."""
    row = next(row for row in ROWS_ALONE.values() if row_key(row) == key)
    caches = [entry.merge([entry]) for entry in ALONE.routed.new_cache(row)]
    logits = ALONE.routed(mx.array([[*prompt, *answer]]), cache=caches)[0, len(prompt) - 1 : -1]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return logprobs[np.arange(len(answer)), list(answer)].tolist()


def expected_tokens(row: RowAdapters, prompt: tuple[int, ...]) -> list[int]:
    return expected_of_key(row_key(row), prompt)


LoopMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLoop = LoopMachine.TestCase

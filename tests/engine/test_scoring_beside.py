"""Scoring and decoding side by side when one of them fails, or the model is changed: who is concerned."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from server.engine.messages import Cancel, Failed, Finished, SamplingParams, Scored, Update
from tests.engine.scores import check, expected, scoring
from tests.engine.support import (
    CountingModel,
    FickleCaches,
    Poisoned,
    Transcript,
    prompts,
    reference,
    run,
    small_loop,
    submit,
)
from tests.models import VOCABULARY, tiny_llama

# Nobody generates the poison by chance.
MUTE = SamplingParams(temperature=0.0, logit_bias=((Poisoned.token, -1e9),))


def harmless(lengths: list[int], seed: int) -> list[list[int]]:
    return [[token % 90 for token in prompt] for prompt in prompts(lengths, seed=seed)]


def muted(model: nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """What mlx-lm generates when it never chooses the poison."""
    bias = mx.where(mx.arange(VOCABULARY) == Poisoned.token, -1e9, 0.0)
    return reference(model, prompt, max_tokens, logits_processors=[lambda _, logits: logits + bias])


@pytest.mark.parametrize("where", [0, 20, -1])
def test_a_forward_of_the_batch_that_raises_fails_what_is_scored_beside_it(where: int) -> None:
    """Reading the poison, early or late, and beginning with it."""
    model = tiny_llama()
    loop = small_loop(Poisoned(model), max_batch_size=6)
    prompt, long, short, stream, poisoned = harmless([12, 200, 8, 6, 30], seed=41)
    poisoned[where] = Poisoned.token
    running, waiting = scoring("running", prompt, long, long), scoring("waiting", prompt, short, long, short)
    transcript = Transcript()
    loop.submit(running)
    loop.submit(submit("stream", stream, 40, sampling=MUTE))
    for _ in range(4):
        transcript.add(loop.step())
    assert loop.stats.scoring_rows == 2
    loop.submit(submit("poisoned", poisoned, 4, sampling=MUTE))
    loop.submit(waiting)
    run(loop, submit("later", stream, 5, sampling=MUTE), transcript=transcript)
    end = transcript.end("poisoned")
    assert isinstance(end, Failed)
    assert transcript.end("running") == transcript.end("stream") == end
    check(model, transcript, waiting)
    assert transcript.tokens("later") == muted(model, stream, 5)
    assert loop.stats.failures == 3
    assert loop.stats.running_rows == loop.stats.scoring_rows == 0


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_scoring_that_raises_fails_what_was_scored_and_no_stream(where: str) -> None:
    model = tiny_llama()
    loop = small_loop(Poisoned(model), max_batch_size=8)
    prompt, answer, stream, read = harmless([12, 8, 6, 60], seed=32)
    poisoned = [*prompt[:5], Poisoned.token, *prompt[5:]]
    bad = scoring("bad", poisoned, answer) if where == "prompt" else scoring("bad", prompt, poisoned)
    beside, waiting = scoring("beside", prompt, answer, [1] * 90), scoring("waiting", prompt, *[answer] * 4)
    transcript = run(
        loop,
        submit("stream", stream, 20, sampling=MUTE),
        submit("read", read, 8, sampling=MUTE),
        bad,
        beside,
        waiting,
    )
    assert transcript.end("bad") == transcript.end("beside")
    assert isinstance(transcript.end("bad"), Failed)
    assert transcript.tokens("stream") == muted(model, stream, 20)
    assert transcript.tokens("read") == muted(model, read, 8)
    assert isinstance(transcript.end("read"), Finished)
    check(model, transcript, waiting)
    assert loop.stats.failures == 2


class NoCaches(FickleCaches):
    """A model that has no caches for a new row while it is broken."""

    def make_cache(self) -> list[KVCache]:
        if self._broken:
            raise RuntimeError("broken")
        return super().make_cache()


def test_what_cannot_be_started_to_be_scored_fails_alone() -> None:
    broken: list[bool] = []
    model = tiny_llama()
    loop = small_loop(NoCaches(model, broken))
    prompt, answer = prompts([20, 7], seed=42)
    loop.submit(submit("stream", [1, 2, 3], 6))
    transcript = Transcript()
    transcript.add(loop.step())
    broken.append(True)
    loop.submit(scoring("bad", prompt, answer))
    transcript.add(loop.step())
    assert isinstance(transcript.end("bad"), Failed)
    broken.clear()
    job = scoring("next", prompt, answer)
    run(loop, job, transcript=transcript)
    check(model, transcript, job)
    assert transcript.tokens("stream") == reference(model, [1, 2, 3], 6)
    assert loop.stats.failures == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_draining_update_waits_for_what_is_scored_and_harms_nothing(fails: bool) -> None:
    model = tiny_llama()
    loop = small_loop(model, max_batch_size=4)
    prompt, *answers = prompts([12, 90, 30, 6], seed=43)
    jobs = [scoring("running", prompt, *answers[:2]), scoring("waiting", prompt, *answers)]
    transcript, seen = Transcript(), list[tuple[int, int, int]]()
    loop.submit(jobs[0])
    loop.submit(submit("stream", prompt, 3))
    for _ in range(3):
        transcript.add(loop.step())

    def look(context: Any) -> None:
        stats = loop.stats
        seen.append((stats.running_rows, stats.scoring_rows, stats.waiting_requests))
        if fails:
            raise ValueError("mine")

    at_once, drained = Future[Any](), Future[Any]()
    loop.update(Update(look, at_once))
    loop.update(Update(look, drained, drain=True))
    loop.submit(jobs[1])
    run(loop, transcript=transcript)
    assert [bool(future.exception(timeout=0)) for future in (at_once, drained)] == [fails, fails]
    assert seen[0][1] > 0
    assert seen[1:] == [(0, 0, 1)]
    check(model, transcript, *jobs)
    assert transcript.tokens("stream") == reference(model, prompt, 3)


def test_answers_that_are_cancelled_before_their_turn_are_never_read() -> None:
    """Of a request that waits, and of one whose prompt is being read."""
    model, read = tiny_llama(), list[int]()
    loop = small_loop(CountingModel(model, read), max_batch_size=2)
    prompt, *answers = prompts([40, 9, 11], seed=44)
    first, second = scoring("first", prompt, *answers), scoring("second", prompt, *answers)
    transcript = Transcript()
    loop.submit(first)
    loop.submit(second)
    transcript.add(loop.step())
    for name in ("first", "second"):
        loop.cancel(Cancel(name, 0))
    run(loop, transcript=transcript)
    for name in ("first", "second"):
        (event,) = [event for event in transcript.events[name] if not isinstance(event, Finished)]
        assert isinstance(event, Scored)
        assert event.answer == 1
        assert list(event.logprobs) == pytest.approx(expected(model, prompt, answers[1]), abs=1e-4)
    assert sum(read) < 2 * (39 + 11) + 9  # some of it is padding

"""Scoring: the log-probabilities of given tokens are those of one plain forward, whatever runs beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import RowAdapters
from server.engine.engine import check_scoring
from server.engine.errors import EngineStoppedError, InvalidSubmitError
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.messages import Cancel, Failed, Finished, SamplingParams, Scoring, Token
from tests.engine.architectures import tiny_falcon, tiny_lfm2, tiny_mamba
from tests.engine.scores import check, expected, scores, scoring
from tests.engine.support import (
    CountingModel,
    Transcript,
    make_context,
    prompts,
    reference,
    run,
    small_loop,
    submit,
    tiny_gemma,
)
from tests.models import VOCABULARY, make_adapter, tiny_llama

MODELS = [tiny_llama, tiny_gemma, tiny_mamba, tiny_lfm2, tiny_falcon]
KINDS = [("lora", 1), ("dora", 2), ("lora", 3)]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("prompt_cache_bytes", [0, 1 << 24])
def test_scores_are_those_of_one_forward(make: Callable[[], nn.Module], prompt_cache_bytes: int) -> None:
    """Answers of one token to some pieces' length, prompts of one token and more, together and in pieces."""
    model = make()
    loop = small_loop(model, prompt_cache_bytes=prompt_cache_bytes, max_batch_size=16, keep_prompt_tokens=8)
    short, prompt, *answers = prompts([1, 19, 1, 2, 30, 9, 17], seed=21)
    jobs = [
        scoring("all", prompt, *answers),
        scoring("from one token", short, *answers[:3]),
        scoring("one", prompt, answers[4]),
    ]
    check(model, run(loop, *jobs), *jobs)
    assert loop.stats.scored_tokens == sum(len(answer) for job in jobs for answer in job.answers)
    assert loop.stats.scoring_rows == 0
    assert loop.idle


def test_rows_of_different_adapters_share_forwards_and_keep_apart(tmp_path: Path) -> None:
    read: list[int] = []
    context = make_context(tiny_llama())
    context.routed.model, bank = CountingModel(context.model, read), context.bank
    loop = GenerationLoop(context, LoopOptions(max_batch_size=16))
    prompt, *answers = prompts([21, 12, 7, 12], seed=22)
    models: dict[str, nn.Module] = {"base": tiny_llama()}
    rows: dict[str, RowAdapters] = {"base": ()}
    for kind, seed in KINDS:
        folder = make_adapter(tmp_path / f"{seed}", tiny_llama(), kind, seed=seed, rank=2 + seed)
        adapter = bank.add(bank.prepare(AdapterContainer.from_directory(folder)))
        rows[str(seed)] = ((adapter, 1.0),)
        models[str(seed)] = load_adapters(tiny_llama(), str(folder))
        models[str(seed)].eval()
    jobs = {name: scoring(name, prompt, *answers, row=row) for name, row in rows.items()}
    transcript = run(loop, *jobs.values())
    for name, job in jobs.items():
        check(models[name], transcript, job)
    assert len({tuple(scores(transcript, name)[0]) for name in jobs}) == len(jobs)
    # Four prompts in one forward; then all twelve answers in one or two, the padding cheaper than another.
    assert read[0] == 4 * 20
    assert len(read) <= 3


@pytest.mark.parametrize("make", MODELS)
def test_a_models_own_answer_scores_as_it_was_generated(make: Callable[[], nn.Module]) -> None:
    model = make()
    loop = small_loop(model)
    (prompt,) = prompts([30], seed=23)
    sampling = SamplingParams(temperature=0.0, top_logprobs=0)
    generated = run(loop, submit("r", prompt, 25, sampling=sampling))
    told = [event.logprob for event in generated.events["r"] if isinstance(event, Token)]
    job = scoring("s", prompt, generated.tokens("r"))
    assert scores(run(loop, job), "s")[0] == pytest.approx(told, abs=1e-4)


def test_the_prompt_comes_from_the_cache_of_its_generation_and_is_kept_for_others() -> None:
    model = tiny_llama()
    read: list[int] = []
    loop = small_loop(CountingModel(model, read), prefill_step_tokens=512, keep_prompt_tokens=16)
    prompt, other, answer = prompts([40, 40, 6], seed=24)
    run(loop, submit("r", prompt, 4))
    read.clear()
    transcript = run(loop, scoring("s", prompt, answer))
    assert (transcript.end("s"), sum(read)) == (Finished(39), 6)
    run(loop, scoring("first", other, answer))
    read.clear()
    assert run(loop, scoring("again", other, answer, answer)).end("again") == Finished(39)
    assert sum(read) == 2 * 6


def test_no_forward_is_larger_than_a_step_however_long_the_answers_are() -> None:
    model = tiny_llama()
    read: list[int] = []
    loop = small_loop(CountingModel(model, read), max_batch_size=8, prefill_step_tokens=32)
    prompt, *answers = prompts([5, 150, 90, 149, 33, 1], seed=25)
    job = scoring("s", prompt, *answers)
    check(model, run(loop, job), job)
    assert max(read) <= 1.25 * 32
    assert sum(read) < 1.5 * sum(map(len, answers))


class Clock:
    """A hundredth of a second for each forward and for each of its tokens."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self) -> float:
        return (len(self.read) + sum(self.read)) / 100


@pytest.mark.parametrize("reads_too", [False, True])
def test_streams_go_on_beside_it_with_gaps_of_a_few_steps(reads_too: bool) -> None:
    model, clock = tiny_llama(), Clock()
    loop = GenerationLoop(
        make_context(CountingModel(model, clock.read)), LoopOptions(max_batch_size=16), clock
    )
    streams = {f"r{index}": prompt for index, prompt in enumerate(prompts([5] * 12, seed=26))}
    for name, prompt in streams.items():
        loop.submit(submit(name, prompt, 90))
    transcript = Transcript()
    for _ in range(8):
        transcript.add(loop.step())
    decode = -clock()
    transcript.add(loop.step())
    decode += clock()
    prompt, *answers = prompts([300, 500, 400], seed=27)
    job = scoring("s", prompt, *answers)
    loop.submit(job)
    if reads_too:
        loop.submit(submit("long", prompts([900], seed=28)[0], 2))
    gaps = []
    while not transcript.ended("s"):
        before, events = clock(), loop.step()
        transcript.add(events)
        assert {name for name, event in events if isinstance(event, Token)} >= streams.keys()
        gaps.append(clock() - before)
    assert len(gaps) >= 8
    # The last of a prompt is worth a longer gap.
    assert decode < np.median(gaps[3:]) <= 6 * decode
    assert max(gaps[3:]) <= 8 * decode
    run(loop, transcript=transcript)
    check(model, transcript, job)
    for name, prompt in streams.items():
        assert transcript.tokens(name) == reference(model, prompt, 90)


def test_a_short_request_does_not_wait_for_a_long_ones_end() -> None:
    model = tiny_llama()
    loop = small_loop(model, max_batch_size=16, prefill_step_tokens=16)
    prompt, long, short = prompts([9, 160, 5], seed=29)
    many, one = scoring("many", prompt, *[long] * 8), scoring("one", prompt, short)
    loop.submit(many)
    transcript = Transcript()
    for _ in range(5):
        transcript.add(loop.step())
    loop.submit(one)
    steps = 0
    while not transcript.ended("one"):
        transcript.add(loop.step())
        steps += 1
    assert steps <= 5
    assert not transcript.events["many"]
    run(loop, transcript=transcript)
    check(model, transcript, many, one)


def test_answers_take_rows_as_choices_do() -> None:
    model = tiny_llama()
    loop = small_loop(model, max_batch_size=4)
    prompt, *answers = prompts([9, *[6] * 9], seed=30)
    jobs = [
        scoring("a", prompt, *answers[:3]),
        scoring("b", prompt, *answers[3:6]),
        scoring("c", prompt, *answers),
    ]
    for job in jobs:
        loop.submit(job)
    transcript = Transcript()
    while not loop.idle:
        transcript.add(loop.step())
        assert loop.stats.scoring_rows <= (9 if loop.stats.waiting_requests == 0 else 4)
    check(model, transcript, *jobs)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("make", [tiny_llama, tiny_lfm2])
def test_cancelling_at_any_moment_spares_the_others(make: Callable[[], nn.Module], steps: int) -> None:
    model = make()
    loop = small_loop(model, max_batch_size=8)
    gone, kept, *answers = prompts([25, 14, 30, 9, 17], seed=31)
    left, stays = scoring("gone", gone, *answers), scoring("stays", kept, *answers)
    transcript = Transcript()
    for one in (left, stays, submit("stream", kept, 12)):
        loop.submit(one)
    for _ in range(steps):
        transcript.add(loop.step())
    loop.cancel(Cancel("stays", 1))
    loop.cancel(Cancel("gone"))
    loop.cancel(Cancel("gone"))
    run(loop, transcript=transcript)
    assert isinstance(transcript.end("gone"), Finished)
    found = scores(transcript, "stays")
    assert found.keys() | {1} == {0, 1, 2}
    for index, logprobs in found.items():
        assert logprobs == pytest.approx(expected(model, kept, answers[index]), abs=1e-4)
    assert transcript.tokens("stream") == reference(model, kept, 12)
    assert loop.stats.scoring_rows == 0


def test_fail_all_ends_it_too() -> None:
    loop = small_loop(tiny_llama())
    prompt, answer = prompts([9, 60], seed=33)
    loop.submit(scoring("running", prompt, answer, answer))
    loop.submit(scoring("waiting", prompt, answer, answer, answer))
    transcript = Transcript()
    transcript.add(loop.step())
    transcript.add(loop.fail_all("gone", EngineStoppedError("gone")))
    assert transcript.end("running") == transcript.end("waiting") == Failed("gone", "stopped")
    assert loop.idle


def test_logprobs_are_of_the_logits_as_they_are() -> None:
    """A model whose logits are far apart has finite ones all the same."""

    class Steep(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        @property
        def layers(self) -> list[nn.Module]:
            return self.model.layers

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            return 100 * self.model(inputs, cache=cache)

    loop = small_loop(Steep(tiny_llama()))
    prompt, answer = prompts([5, 20], seed=34)
    job = scoring("s", prompt, answer)
    found = scores(run(loop, job), "s")[0]
    assert found == pytest.approx(expected(Steep(tiny_llama()), prompt, answer), rel=1e-4)
    assert min(found) < -VOCABULARY


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (scoring("s", [], [1]), "at least one token"),
        (scoring("s", [1]), "at least one answer"),
        (scoring("s", [1], [2], []), "at least one token"),
        (scoring("s", [1], [2], [VOCABULARY]), f"from 0 to {VOCABULARY - 1}"),
        (scoring("s", [-1], [2]), f"from 0 to {VOCABULARY - 1}"),
    ],
)
def test_what_cannot_be_scored_is_refused(job: Scoring, problem: str) -> None:
    with pytest.raises(InvalidSubmitError, match=problem):
        check_scoring(job, VOCABULARY)

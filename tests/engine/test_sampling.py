"""Sampling of rows: reproducible, within its filters, and with the penalties that other servers mean."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.messages import SamplingParams, Token
from server.engine.sampling import make_processors, make_sampler, read_logprobs
from tests.engine.support import make_loop, reference, run, submit
from tests.models import VOCABULARY, tiny_llama

WARM = SamplingParams(temperature=1.0, seed=11)


def logprobs(values: list[float]) -> mx.array:
    logits = mx.array(values, dtype=mx.float32)[None]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draws(params: SamplingParams, row: mx.array, count: int, *, seed: int = 0, choice: int = 0) -> list[Any]:
    sampler = make_sampler(params, seed, choice)
    return [sampler(row).item() for _ in range(count)]


# Reproducible


def test_a_seeded_request_says_the_same_alone_and_in_any_batch() -> None:
    model = tiny_llama()
    seeded = submit("seeded", [4, 5, 6, 7], 12, sampling=WARM, choices=2)
    alone = run(make_loop(model), seeded)
    others = [
        submit(f"other {i}", list(range(1, 3 + 5 * i)), 9, sampling=SamplingParams(temperature=1.5, seed=i))
        for i in range(5)
    ]
    crowded = run(make_loop(model, prefill_step_tokens=8), *others[:2], seeded, *others[2:])
    for choice in range(2):
        assert crowded.tokens("seeded", choice) == alone.tokens("seeded", choice)
    assert alone.tokens("seeded", 0) != alone.tokens("seeded", 1)


def test_another_seed_says_something_else_and_no_seed_something_new_each_time() -> None:
    model = tiny_llama()

    def said(seed: int | None) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return tuple(run(make_loop(model), submit("r", [1, 2, 3], 12, sampling=sampling)).tokens("r"))

    assert said(1) == said(1)
    assert len({said(1), said(2), said(-1), said(2**63), said(None), said(None)}) == 6


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 15), st.integers(1, 5))
def test_a_draw_depends_on_seed_choice_and_step_alone(seed: int, choice: int, steps: int) -> None:
    row = logprobs([0.0] * 1000)
    params = SamplingParams(temperature=0.7)
    drawn = draws(params, row, steps, seed=seed, choice=choice)
    mx.random.seed(steps)
    sampler = make_sampler(params, seed, choice)
    for expected in drawn:
        draws(params, row, 1, seed=seed + 1)
        assert sampler(row).item() == expected


def test_draws_follow_the_probabilities() -> None:
    row = logprobs(np.log([0.5, 0.3, 0.2]).tolist())
    counted = np.bincount(draws(SamplingParams(temperature=1.0), row, 3000), minlength=3) / 3000
    np.testing.assert_allclose(counted, [0.5, 0.3, 0.2], atol=0.04)
    squared = np.array([0.25, 0.09, 0.04]) / 0.38
    counted = np.bincount(draws(SamplingParams(temperature=0.5), row, 3000), minlength=3) / 3000
    np.testing.assert_allclose(counted, squared, atol=0.04)


# Filters


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_k=1), {0}),
        (SamplingParams(top_k=4), {0, 1, 2, 3}),
        (SamplingParams(top_k=100), {0, 1, 2, 3}),
        (SamplingParams(top_p=0.45), {0, 1}),
        (SamplingParams(top_p=0.75), {0, 1, 2}),
        (SamplingParams(top_p=0.0), {0}),
        (SamplingParams(top_p=1e-9), {0}),
        (SamplingParams(min_p=0.7), {0, 1}),
        (SamplingParams(min_p=1.0), {0}),
        (SamplingParams(temperature=1e-7), {0}),
        (SamplingParams(top_p=0.75, min_p=0.3, top_k=2), {0, 1}),
    ],
)
def test_filters_keep_what_they_say(params: SamplingParams, allowed: set[int]) -> None:
    row = logprobs(np.log([0.4, 0.3, 0.2, 0.1]).tolist())
    assert set(draws(params, row, 120)) == allowed


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_rows_are_drawn_from_in_float32(dtype: Any) -> None:
    row = logprobs(np.log([0.4, 0.3, 0.2, 0.1]).tolist()).astype(dtype)
    params = SamplingParams(temperature=0.3, top_p=0.9, min_p=0.01, top_k=3)
    assert set(draws(params, row, 50)) <= {0, 1, 2}


def test_all_greedy_rows_share_one_sampler() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert make_sampler(greedy, 1, 0) is make_sampler(SamplingParams(temperature=0.0, top_p=0.5), 2, 3)


# Penalties


def processed(
    params: SamplingParams, prompt: list[int], completion: list[int], logits: list[float]
) -> list[float]:
    row = mx.array([logits])
    for processor in make_processors(params, len(prompt)):
        row = processor(mx.array(prompt + completion), row)
    return np.array(row[0]).tolist()


def test_presence_counts_a_generated_token_once_and_no_prompt_token() -> None:
    params = SamplingParams(presence_penalty=0.5)
    assert processed(params, [0, 0, 1], [2, 2, 3], [1.0, 1, 1, 1, 1]) == [1, 1, 0.5, 0.5, 1]
    assert processed(params, [0, 1], [], [1.0, 1, 1]) == [1, 1, 1]


def test_frequency_counts_a_generated_token_every_time_and_no_prompt_token() -> None:
    params = SamplingParams(frequency_penalty=0.5)
    assert processed(params, [0, 0, 1], [2, 2, 3], [1.0, 1, 1, 1, 1]) == [1, 1, 0, 0.5, 1]


def test_repetition_looks_at_prompt_and_completion_and_is_aware_of_signs() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert processed(params, [0, 1], [2], [1.0, -1, 3, 5]) == [0.5, -2, 1.5, 5]


def test_penalties_look_back_over_a_long_row() -> None:
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0)
    completion = [1] + [2] * 500
    assert processed(params, [3] + [4] * 500, completion, [1.0, 4, 4, 4, 4]) == [1, 1, 1, 2, 2]


def test_parameters_at_rest_make_no_processors() -> None:
    assert make_processors(SamplingParams(), 5) == []


def test_a_bias_forbids_and_forces_tokens_in_the_loop() -> None:
    model = tiny_llama()
    plain = reference(model, [1, 2, 3], 4)
    forced = SamplingParams(temperature=0.0, logit_bias=((9, 100.0),))
    forbidden = SamplingParams(temperature=0.0, logit_bias=tuple((token, -100.0) for token in set(plain)))
    transcript = run(
        make_loop(model),
        submit("plain", [1, 2, 3], 4),
        submit("forced", [1, 2, 3], 4, sampling=forced),
        submit("forbidden", [1, 2, 3], 4, sampling=forbidden),
    )
    assert transcript.tokens("plain") == plain
    assert transcript.tokens("forced") == [9] * 4
    assert not set(transcript.tokens("forbidden")) & set(plain)


@pytest.mark.parametrize("choices", [1, 3])
def test_a_frequency_penalty_in_the_loop_acts_on_each_choice_alone(choices: int) -> None:
    sampling = SamplingParams(temperature=0.0, frequency_penalty=100.0)
    transcript = run(make_loop(tiny_llama()), submit("r", [1, 2, 3], 60, sampling=sampling, choices=choices))
    for choice in range(choices):
        assert len(set(transcript.tokens("r", choice))) == 60


def test_penalties_in_the_loop_are_the_same_whether_the_prompt_was_cached_or_not() -> None:
    sampling = SamplingParams(temperature=0.0, presence_penalty=0.8, repetition_penalty=1.3)
    loop = make_loop(tiny_llama())
    first = run(loop, submit("r", list(range(30)), 20, sampling=sampling))
    again = run(loop, submit("r", list(range(30)), 20, sampling=sampling))
    assert again.end("r") != first.end("r")
    assert again.tokens("r") == first.tokens("r")


# Log-probabilities


def test_logprobs_are_the_models_own_and_only_for_those_who_ask() -> None:
    model = tiny_llama()
    prompt = [1, 2, 3, 4]
    asked = SamplingParams(temperature=0.7, seed=3, top_logprobs=4)
    chosen_only = SamplingParams(temperature=0.0, top_logprobs=0)
    transcript = run(
        make_loop(model),
        submit("asked", prompt, 5, sampling=asked),
        submit("chosen", prompt, 5, sampling=chosen_only),
        submit("plain", prompt, 5),
    )
    said = transcript.tokens("asked")
    logits = model(mx.array([prompt + said]))[0, len(prompt) - 1 : -1]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for step, event in enumerate(transcript.events["asked"][:5]):
        assert isinstance(event, Token)
        assert event.logprob == pytest.approx(expected[step, event.token], abs=1e-4)
        assert [token for token, _ in event.top] == np.argsort(-expected[step])[:4].tolist()
        assert [value for _, value in event.top] == pytest.approx(np.sort(expected[step])[:-5:-1], abs=1e-4)
    for event in transcript.events["chosen"][:5]:
        assert isinstance(event, Token)
        assert event.logprob is not None
        assert event.top == ()
    assert transcript.events["plain"][:5] == [Token(0, token) for token in reference(model, prompt, 5)]


def test_more_top_logprobs_than_tokens_are_all_of_them() -> None:
    row = mx.array(np.log([0.1, 0.6, 0.3]), dtype=mx.float32)
    ((chosen, top),) = read_logprobs([(row, 2, VOCABULARY)])
    assert chosen == pytest.approx(np.log(0.3))
    assert [token for token, _ in top] == [1, 2, 0]

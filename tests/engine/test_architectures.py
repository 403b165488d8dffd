"""Caches that cannot be trimmed: batches are exact, conversations and shared beginnings still hit."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from server.engine.messages import Finished, SamplingParams, Token
from tests.engine.architectures import tiny_falcon, tiny_lfm2, tiny_mamba
from tests.engine.support import Transcript, prompts, reference, run, small_loop, submit, tiny_gemma

MODELS = [tiny_mamba, tiny_lfm2, tiny_falcon, tiny_gemma]
Make = Callable[[], nn.Module]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("keep_prompt_tokens", [4, 128])
def test_batched_tokens_are_those_of_one_at_a_time(make: Make, keep_prompt_tokens: int) -> None:
    model = make()
    loop = small_loop(model, prefill_batch_size=3, keep_prompt_tokens=keep_prompt_tokens)
    requests = {f"r{i}": prompt for i, prompt in enumerate(prompts([1, 23, 40, 17, 3, 9, 33, 5], seed=11))}
    transcript = run(loop, *(submit(name, prompt, 8) for name, prompt in requests.items()))
    for name, prompt in requests.items():
        assert transcript.tokens(name) == reference(model, prompt, 8)


@pytest.mark.parametrize("make", MODELS)
def test_reading_prompts_of_unequal_length_together_is_exact(make: Make) -> None:
    """Tokens could agree by chance where recurrent state has seen padding; log-probabilities do not."""
    model = make()
    loop = small_loop(model, max_batch_size=8, prefill_batch_size=8, prefill_step_tokens=16)
    requests = {f"r{i}": prompt for i, prompt in enumerate(prompts([5, 29, 17, 40], seed=3))}
    sampling = SamplingParams(temperature=0.0, top_logprobs=0)
    transcript = run(loop, *(submit(name, prompt, 1, sampling=sampling) for name, prompt in requests.items()))
    for name, prompt in requests.items():
        logits = model(mx.array([prompt]))[0, -1]
        (token,) = [event for event in transcript.events[name] if isinstance(event, Token)]
        assert token.logprob == pytest.approx((logits.max() - mx.logsumexp(logits)).item(), abs=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_choices_start_from_what_one_of_them_has_read(make: Make) -> None:
    model = make()
    (prompt,) = prompts([21], seed=12)
    transcript = run(small_loop(model), submit("r", prompt, 5, choices=3), submit("beside", prompt[:9], 5))
    for choice in range(3):
        assert transcript.tokens("r", choice) == reference(model, prompt, 5)
    assert transcript.tokens("beside") == reference(model, prompt[:9], 5)


@pytest.mark.parametrize("make", MODELS)
def test_a_conversation_goes_on_from_the_end_of_its_last_prompt(make: Make) -> None:
    """Also where the answer comes back differently than it was generated, as templates often have it."""
    model = make()
    loop = small_loop(model, keep_prompt_tokens=8)
    first, question, changed = prompts([30, 12, 9], seed=13)
    run(loop, submit("first", first, 6))
    again = run(loop, submit("again", first, 6))
    assert again.tokens("again") == reference(model, first, 6)
    assert again.end("again") == Finished(29)
    turn = [*first, *changed, *question]
    second = run(loop, submit("second", turn, 6))
    assert second.tokens("second") == reference(model, turn, 6)
    assert second.end("second") == Finished(29)


@pytest.mark.parametrize("make", MODELS)
def test_a_shared_beginning_is_kept_once_two_prompts_have_shown_it(make: Make) -> None:
    model = make()
    loop = small_loop(model, keep_prompt_tokens=8)
    system, *questions = prompts([24, 10, 11, 12], seed=14)
    cached = []
    for turn, question in enumerate(questions):
        transcript = run(loop, submit(f"r{turn}", [*system, *question], 5))
        assert transcript.tokens(f"r{turn}") == reference(model, [*system, *question], 5)
        end = transcript.end(f"r{turn}")
        assert isinstance(end, Finished)
        cached.append(end.cached_tokens)
    assert cached == [0, 0, 24]


@pytest.mark.parametrize("make", MODELS)
def test_a_prompt_that_goes_on_where_another_ends_waits_for_it(make: Make) -> None:
    model = make()
    loop = small_loop(model, keep_prompt_tokens=8)
    short, more = prompts([25, 11], seed=15)
    transcript = run(loop, submit("short", short, 4), submit("long", [*short, *more], 4))
    assert transcript.tokens("short") == reference(model, short, 4)
    assert transcript.tokens("long") == reference(model, [*short, *more], 4)
    assert transcript.end("long") == Finished(24)


@pytest.mark.parametrize("rows", [2, 8, 64])
def test_kept_recurrent_state_holds_on_to_no_batch(rows: int) -> None:
    loop = small_loop(tiny_mamba(), max_batch_size=64, prefill_batch_size=64)
    transcript = Transcript()
    run(loop, *(submit(f"r{i}", p, 3) for i, p in enumerate(prompts([12] * rows))), transcript=transcript)
    kept = loop._context.prompt_cache  # pyright: ignore[reportPrivateUsage] (memory is what is measured)
    mx.synchronize()
    held_bytes, before = kept.stats.bytes_held, mx.get_active_memory()
    kept.leave_room(held_bytes // 2)
    freed_bytes = held_bytes - kept.stats.bytes_held
    assert before - mx.get_active_memory() == pytest.approx(freed_bytes, rel=0.1, abs=rows * 1024)

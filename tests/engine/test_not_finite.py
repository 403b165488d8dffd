"""Logits that are NaN or infinite end their own request with an error, and nothing else."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from structlog.testing import capture_logs

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import RowAdapters, make_row
from adapters_core.mixed.routing import HighestLogits
from server.engine.context import ModelContext
from server.engine.loop import GenerationLoop
from server.engine.messages import Failed, Finished, SamplingParams, Scored, Scoring, Update
from server.engine.prompt_cache import PromptCache
from tests.engine.support import GREEDY, make_loop, prompts, reference, run, small_loop, submit
from tests.models import VOCABULARY, adapter_tensors, adapter_values, tiny_llama, write_adapter

PROMPTS = prompts([5, 9, 14, 23])
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=1.0, seed=3),
    "with log-probabilities": SamplingParams(temperature=0.0, top_logprobs=3),
    "penalised": SamplingParams(temperature=0.7, seed=1, repetition_penalty=1.3, presence_penalty=0.5),
}


def context_of(loop: GenerationLoop) -> ModelContext:
    future: Future[Any] = Future()
    loop.update(Update(lambda context: context, future))
    loop.step()
    return future.result(timeout=0)


def overflowing(loop: GenerationLoop, root: Path, token: int | None = None) -> RowAdapters:
    """A row of an adapter whose logits are not finite, always or once `token` has been read."""
    model = tiny_llama()
    keys = ["lm_head"] if token is None else ["model.embed_tokens"]
    values = adapter_values(keys=keys, scale=1.0)
    tensors = {name: mx.full(each.shape, 1e30) for name, each in adapter_tensors(model, values).items()}
    if token is not None:
        (name,) = (name for name in tensors if name.endswith("lora_a"))
        tensors[name] = tensors[name] * (mx.arange(VOCABULARY) == token)[:, None]
    folder = write_adapter(root / f"overflow {token}", values, tensors)
    resident = context_of(loop).bank.add(AdapterContainer.from_directory(folder))
    return make_row([(resident, 1.0)])


def failure(found: object) -> Failed:
    assert isinstance(found, Failed)
    assert found.kind == "not_finite"
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_request_of_such_logits_fails_before_its_first_token(
    sampling: SamplingParams, tmp_path: Path
) -> None:
    loop = small_loop(tiny_llama())
    bad = overflowing(loop, tmp_path)
    requests = [submit(f"good {at}", prompt, 6) for at, prompt in enumerate(PROMPTS[:3])]
    requests.insert(1, submit("bad", PROMPTS[3], 6, row=bad, sampling=sampling, choices=2, model="pirate"))
    with capture_logs() as logs:
        transcript = run(loop, *requests)
    assert transcript.events["bad"] == [failure(transcript.end("bad"))]
    assert "'pirate' at token 1 are NaN or infinite" in failure(transcript.end("bad")).message
    for at, prompt in enumerate(PROMPTS[:3]):
        assert transcript.tokens(f"good {at}") == reference(tiny_llama(), prompt, 6)
        assert isinstance(transcript.end(f"good {at}"), Finished)
    (log,) = [entry for entry in logs if entry["event"] == "logits are not finite"]
    assert (log["model"], log["step"], log["request_id"]) == ("pirate", 1, "bad")
    assert log["adapters"] == [(bad[0][0].digest, 1.0)]
    assert loop.stats.failures == 1
    assert (loop.stats.running_rows, loop.stats.running_requests) == (0, 0)


@pytest.mark.parametrize("beside", [0, 2])
def test_an_answer_breaks_off_at_the_very_token(beside: int, tmp_path: Path) -> None:
    others = PROMPTS[2 : 2 + beside]
    fresh = (
        (prompt, expected, at)
        for prompt in prompts([9] * 20, seed=8)
        for expected in [reference(tiny_llama(), prompt, 12)]
        for at in range(2, 11)
        if expected[at] not in [*prompt, *expected[:at]]
    )
    prompt, expected, at = next(fresh)
    token = expected[at]
    loop = small_loop(tiny_llama())
    row = overflowing(loop, tmp_path, token)
    fine = [submit(f"good {at}", other, 12) for at, other in enumerate(others)]
    for _ in range(2):  # the second may start from what the first has left
        with capture_logs() as logs:
            transcript = run(loop, submit("bad", prompt, 12, row=row), *fine)
        assert transcript.tokens("bad") == expected[: at + 1]
        assert f"at token {at + 2} " in failure(transcript.end("bad")).message
        assert [entry["step"] for entry in logs if entry["event"] == "logits are not finite"] == [at + 2]
        for which, other in enumerate(others):
            assert transcript.tokens(f"good {which}") == reference(tiny_llama(), other, 12)
    # What came before stays right: an answer that ends in time is not concerned.
    assert run(loop, submit("short", prompt, at, row=row)).tokens("short") == expected[:at]


@pytest.mark.parametrize("length", [3, 40])
def test_caches_of_a_prompt_that_overflows_are_never_given_out(length: int, tmp_path: Path) -> None:
    loop = small_loop(tiny_llama(), keep_prompt_tokens=4)
    (prompt,) = prompts([length], seed=5)
    row = overflowing(loop, tmp_path, prompt[1])
    longer = [*prompt, *PROMPTS[0]]
    for name, text in (("one", prompt), ("two", longer)):
        transcript = run(loop, submit(name, text, 4, row=row, choices=2))
        assert transcript.events[name] == [failure(transcript.end(name))]
        assert loop.stats.prompt_cache.entries == 0
    assert loop.stats.cached_tokens == 0


def test_a_cache_with_nan_is_dropped_when_it_is_asked_for() -> None:
    model, cache, tokens = tiny_llama(), PromptCache(1 << 24), PROMPTS[2]
    for spoilt in (False, True):
        kv = make_prompt_cache(model)
        if spoilt:
            model.model.embed_tokens.weight[tokens[3]] = mx.nan
        model(mx.array([tokens]), cache=kv)
        cache.store("key", tokens, kv)
        found, cached = cache.fetch("key", [*tokens, 1])
        assert (found is None, cached) == ((True, 0) if spoilt else (False, len(tokens)))
        cache.clear()
        assert cache.stats.bytes_held == 0


def test_scores_that_are_not_finite_fail_their_request_alone(tmp_path: Path) -> None:
    loop = small_loop(tiny_llama())
    answers = tuple(tuple(prompt) for prompt in PROMPTS[:2])
    token = next(token for token in PROMPTS[1][:-1] if token not in (*PROMPTS[0], *PROMPTS[2]))
    row = overflowing(loop, tmp_path, token)
    bad = Scoring("bad", row, tuple(PROMPTS[2]), answers, model="pirate")
    good = Scoring("good", (), tuple(PROMPTS[2]), answers)
    transcript = run(loop, bad, good, submit("text", PROMPTS[0], 5))
    assert "'pirate'" in failure(transcript.end("bad")).message
    assert not any(isinstance(one, Scored) and one.answer == 1 for one in transcript.events["bad"])
    scored = {one.answer: one.logprobs for one in transcript.events["good"] if isinstance(one, Scored)}
    assert {answer: len(found) for answer, found in scored.items()} == {0: 5, 1: 9}
    assert all(np.isfinite(found).all() for found in scored.values())
    assert transcript.tokens("text") == reference(tiny_llama(), PROMPTS[0], 5)


class Masked(nn.Module):
    """A model that rules the last tokens of its vocabulary out, as padding, by -inf."""

    padding = 20

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner: Any = model

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        is_padding = mx.arange(VOCABULARY) >= VOCABULARY - self.padding
        return mx.where(is_padding, -mx.inf, self.inner(inputs, cache=cache))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_that_are_ruled_out_are_no_error(sampling: SamplingParams) -> None:
    loop = small_loop(Masked(tiny_llama()))
    transcript = run(loop, submit("r", PROMPTS[1], 12, sampling=sampling))
    found = transcript.tokens("r")
    assert isinstance(transcript.end("r"), Finished)
    assert len(found) == 12
    assert max(found) < VOCABULARY - Masked.padding
    answer = (3, VOCABULARY - 1, 4)
    scored = run(loop, Scoring("s", (), tuple(PROMPTS[1]), (answer,))).events["s"][0]
    assert isinstance(scored, Scored)
    assert np.isfinite(scored.logprobs).tolist() == [True, False, True]
    assert scored.logprobs[1] == -np.inf


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_highest_logits_are_finite_where_a_token_can_be_drawn(dtype: mx.Dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [0, 1, 2],
        [nan, 1, 2],
        [0, inf, 2],
        [-inf, 1, -inf],
        [-inf] * 3,
        [6e4, -6e4, 6e4],
        [-inf, nan, 0],
    ]
    found = HighestLogits(mx.array(rows, dtype=dtype)[:, None, :]).finite
    assert found == [True, False, False, True, False, True, False]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 257, 49_153])
def test_one_logit_that_is_not_a_number_is_seen_wherever_it_stands(dtype: mx.Dtype, vocabulary: int) -> None:
    places = [0, 1, vocabulary // 2, vocabulary - 2, vocabulary - 1]
    logits = mx.random.normal((len(places) + 1, 1, vocabulary)).astype(dtype)
    for row, place in enumerate(places):
        logits[row, 0, place] = float("nan")
    assert HighestLogits(logits).finite == [False] * len(places) + [True]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_penalties_stay_in_the_range_of_half_precision(dtype: mx.Dtype) -> None:
    model = tiny_llama()
    model.lm_head.weight = model.lm_head.weight * 1e4
    model.set_dtype(dtype)
    loop = make_loop(model)
    sampling = SamplingParams(temperature=1.0, seed=1, repetition_penalty=0.01, top_logprobs=5)
    transcript = run(loop, submit("r", PROMPTS[3], 6, sampling=sampling))
    assert isinstance(transcript.end("r"), Finished)
    assert len(transcript.tokens("r")) == 6


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-40, 1e-9])
def test_the_smallest_top_p_leaves_the_likeliest_token(top_p: float) -> None:
    loop = small_loop(tiny_llama())
    sampling = SamplingParams(temperature=1.0, seed=1, top_p=top_p)
    found = run(loop, submit("r", PROMPTS[1], 8, sampling=sampling)).tokens("r")
    assert found == reference(tiny_llama(), PROMPTS[1], 8)

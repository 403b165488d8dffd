"""Kept KV caches: exact when used, never used for anything else, and within their bytes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from server.engine.messages import Cancel, Finished, Update
from server.engine.prefixes import TokenText
from server.engine.prompt_cache import PromptCache, PromptMatch
from tests.engine.support import (
    Transcript,
    make_loop,
    prompts,
    reference,
    run,
    small_loop,
    submit,
    tiny_gemma,
)
from tests.models import tiny_llama

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def caches_for(tokens: list[int], make: Any = KVCache) -> list[Any]:
    """KV caches whose keys and values spell `tokens`."""
    cache = make()
    if tokens:
        content = mx.array(tokens, dtype=mx.float32).reshape(1, 1, -1, 1)
        cache.update_and_fetch(content, -content)
    return [cache]


def spelled(caches: list[Any]) -> list[float]:
    keys, _ = caches[0].keys_and_values()
    return keys.reshape(-1).tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), TOKENS), max_size=8), st.sampled_from("abc"), TOKENS)
def test_a_hit_is_the_longest_kept_beginning_under_the_same_key(
    stored: list[tuple[str, list[int]]], key: str, wanted: list[int]
) -> None:
    kept = PromptCache(1 << 20)
    for stored_key, tokens in stored:
        kept.store(stored_key, tokens, caches_for(tokens))
    caches, length = kept.fetch(key, wanted)

    def shared(tokens: list[int]) -> int:
        same = 0
        while same < min(len(tokens), len(wanted) - 1) and tokens[same] == wanted[same]:
            same += 1
        return same

    assert length == max((shared(tokens) for stored_key, tokens in stored if stored_key == key), default=0)
    if length == 0:
        assert caches is None
    else:
        assert caches is not None
        assert spelled(caches) == wanted[:length]
        assert caches[0].offset == length


def test_what_is_fetched_can_be_written_to_without_touching_what_is_kept() -> None:
    kept = PromptCache(1 << 20)
    kept.store("k", [1, 2, 3, 4], caches_for([1, 2, 3, 4]))
    first, _ = kept.fetch("k", [1, 2, 9, 9])
    assert first is not None
    first[0].update_and_fetch(mx.full((1, 1, 2, 1), 9.0), mx.full((1, 1, 2, 1), 9.0))
    assert spelled(first) == [1, 2, 9, 9]
    second, length = kept.fetch("k", [1, 2, 3, 4, 5])
    assert second is not None
    assert (spelled(second), length) == ([1, 2, 3, 4], 4)


def test_caches_that_cannot_be_trimmed_serve_only_what_continues_them() -> None:
    kept = PromptCache(1 << 20)
    long = list(range(20))
    kept.store("k", long, caches_for(long, lambda: RotatingKVCache(max_size=8)))
    assert kept.fetch("k", [*long[:15], 99]) == (None, 0)
    caches, length = kept.fetch("k", [*long, 99])
    assert caches is not None
    assert length == 20
    # Nor do they make a shorter one superfluous.
    kept.store("k", long[:10], caches_for(long[:10], lambda: RotatingKVCache(max_size=8)))
    kept.store("k", [*long, 21], caches_for([*long, 21], lambda: RotatingKVCache(max_size=8)))
    assert kept.fetch("k", [*long[:10], 99])[1] == 10


def test_a_longer_entry_replaces_its_beginnings() -> None:
    kept = PromptCache(1 << 20)
    for length in (2, 4, 6):
        kept.store("k", list(range(length)), caches_for(list(range(length))))
    kept.store("other", [0, 1], caches_for([0, 1]))
    assert kept.stats.entries == 2


def test_the_least_recently_used_goes_first_and_the_bytes_hold() -> None:
    size_bytes = sum(cache.nbytes for cache in caches_for([1, 2, 3]))
    kept = PromptCache(2 * size_bytes)
    for key in ("old", "new"):
        kept.store(key, [1, 2, 3], caches_for([1, 2, 3]))
    kept.fetch("old", [1, 2, 3])
    kept.store("newest", [1, 2, 3], caches_for([1, 2, 3]))
    assert kept.fetch("new", [1, 2, 3])[1] == 0
    assert kept.fetch("old", [1, 2, 3])[1] == 2
    assert kept.stats.bytes_held == 2 * size_bytes
    big = list(range(1000))
    kept.store("too big", big, caches_for(big))
    assert kept.stats.entries == 2
    assert kept.drop(lambda key: key == "old") == size_bytes
    assert kept.clear() == size_bytes
    assert kept.stats.entries == kept.stats.bytes_held == 0
    assert (kept.stats.hits, kept.stats.misses, kept.stats.evictions) == (2, 1, 1)


def test_no_bytes_keep_nothing_and_count_nothing() -> None:
    kept = PromptCache(0)
    kept.store("k", [1, 2, 3], caches_for([1, 2, 3]))
    assert kept.fetch("k", [1, 2, 3]) == (None, 0)
    assert kept.stats == PromptCache(0).stats


def test_the_number_of_entries_is_bounded_too() -> None:
    kept = PromptCache(1 << 20, max_entries=3)
    for first in range(10):
        kept.store("k", [first, 0], caches_for([first, 0]))
    assert kept.stats.entries == 3


def test_a_shorter_entry_is_superfluous_where_a_longer_one_can_be_trimmed() -> None:
    kept = PromptCache(1 << 20)
    kept.store("k", [1, 2, 3, 4], caches_for([1, 2, 3, 4]))
    kept.store("k", [1, 2], caches_for([1, 2]))
    assert (kept.stats.entries, kept.stats.evictions) == (1, 0)


def test_where_a_prompt_parts_from_what_cannot_be_trimmed_is_told() -> None:
    kept = PromptCache(1 << 20)
    long = list(range(20))
    kept.store("k", long, caches_for(long, lambda: RotatingKVCache(max_size=8)))
    assert kept.match("k", [*long[:15], 99, 98]) == PromptMatch(0, 15)
    kept.store("k", long[:12], caches_for(long[:12], lambda: RotatingKVCache(max_size=8)))
    assert kept.match("k", [*long[:15], 99, 98]) == PromptMatch(12, 15)
    assert kept.match("k", [*long, 99]) == PromptMatch(20, 0)
    assert kept.match("other", long) == PromptMatch(0, 0)
    assert (kept.stats.hits, kept.stats.misses) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), TOKENS, st.booleans()), max_size=12), st.integers(1, 40))
def test_the_bytes_are_never_more_than_allowed(
    stored: list[tuple[str, list[int], bool]], tokens: int
) -> None:
    one_token_bytes = caches_for([0])[0].nbytes
    kept = PromptCache(tokens * one_token_bytes)
    for key, spelling, fixed in stored:
        kept.store(key, spelling, caches_for(spelling, partial(RotatingKVCache, 4) if fixed else KVCache))
        assert kept.stats.bytes_held <= tokens * one_token_bytes
        kept.fetch(key, spelling[:-1])
    assert kept.clear() >= 0
    assert kept.stats.entries == kept.stats.bytes_held == 0


def test_looking_up_among_the_most_and_longest_entries_takes_no_time() -> None:
    kept = PromptCache(1 << 40)
    beginning = np.random.default_rng(0).integers(0, 50_000, 8000).tolist()
    for number in range(1024):
        kept.store("k", [*beginning[: 8000 - number], 50_000 + number], [KVCache()])
    assert kept.stats.entries == 1024
    wanted = TokenText.of([*beginning, 1])
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        assert kept.match("k", wanted).cached_tokens == 8000
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01


# Through the loop


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_a_conversation_is_read_once_and_answered_as_if_it_were_not(make: Any) -> None:
    model: nn.Module = make()
    loop = small_loop(model)
    conversation: list[int] = []
    for turn, question in enumerate(prompts([30, 11, 5, 1], seed=9)):
        conversation += question
        name = f"turn {turn}"
        answer = reference(model, conversation, 6)
        transcript = run(loop, submit(name, conversation, 6))
        assert transcript.tokens(name) == answer
        known = len(conversation) - len(question) if turn else 0
        assert transcript.end(name) == Finished(known)
        conversation += answer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_same_prompt_again_computes_its_last_token_alone(make: Any, length: int) -> None:
    model = make()
    (prompt,) = prompts([length], seed=2)
    loop = small_loop(model)
    run(loop, submit("first", prompt, 6))
    transcript = run(loop, submit("again", prompt, 6, choices=3))
    for choice in range(3):
        assert transcript.tokens("again", choice) == reference(model, prompt, 6)
    cached = transcript.end("again")
    # A sliding window that has moved on cannot be taken back to an earlier token.
    assert cached == Finished(length - 1 if make is tiny_llama or length == 1 else cached_of_window(length))


def cached_of_window(length: int) -> int:
    return length - 1 if length + 6 < 8 else 0


@pytest.mark.parametrize("steps", range(1, 9))
def test_what_a_cancelled_request_had_read_is_kept_and_exact(steps: int) -> None:
    model = tiny_llama()
    (prompt,) = prompts([30], seed=3)
    loop = small_loop(model)
    loop.submit(submit("gone", prompt, 20, choices=2))
    transcript = Transcript()
    for _ in range(steps):
        transcript.add(loop.step())
    loop.cancel(Cancel("gone"))
    run(loop, submit("again", prompt, 6), transcript=transcript)
    assert transcript.tokens("again") == reference(model, prompt, 6)
    assert transcript.end("again") == Finished(min(8 * steps, 29))


def test_a_fused_base_has_keys_of_its_own() -> None:
    loop = make_loop(tiny_llama())

    def fuse(digest: str | None) -> Any:
        return lambda context: setattr(context, "fused_digest", digest)

    expected = {None: [0, 19], "sha256:a": [0, 19], "sha256:b": [0, 19]}
    for digest, cached_tokens in expected.items():
        loop.update(Update(fuse(digest), Future(), drain=True))
        for cached in cached_tokens:
            transcript = run(loop, submit("r", list(range(20)), 2))
            assert transcript.end("r") == Finished(cached)
    loop.update(Update(fuse(None), Future(), drain=True))
    assert run(loop, submit("r", list(range(20)), 2)).end("r") == Finished(19)


@pytest.fixture
def exact_memory() -> Iterator[None]:
    """MLX keeps no buffers, which may be a little larger than what is put into them next."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


@pytest.mark.usefixtures("exact_memory")
def test_kept_caches_hold_on_to_no_batch() -> None:
    loop = make_loop(tiny_llama(), max_batch_size=8, prefill_batch_size=8)
    run(loop, *(submit(f"r{i}", prompt, 3) for i, prompt in enumerate(prompts([200] * 8))))
    held_bytes = loop.stats.prompt_cache.bytes_held
    assert loop.stats.prompt_cache.entries == 8
    mx.synchronize()
    before = mx.get_active_memory()
    context: Future[Any] = Future()
    loop.update(Update(lambda context: context.prompt_cache.clear(), context))
    loop.step()
    assert context.result(timeout=0) == held_bytes
    assert mx.get_active_memory() == pytest.approx(before - held_bytes, rel=0.02)


def test_deep_copies_of_caches_share_their_arrays() -> None:
    caches = make_prompt_cache(tiny_llama())
    tiny_llama()(mx.zeros((1, 512), dtype=mx.int32), cache=caches)
    mx.eval([cache.state for cache in caches])
    before = mx.get_active_memory()
    copies = copy.deepcopy(caches)
    mx.eval([cache.state for cache in copies])
    assert mx.get_active_memory() == before

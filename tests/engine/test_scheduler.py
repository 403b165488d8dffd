"""Admission without a model: limits hold, and whatever comes, every request's turn comes too."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_core.mixed.residents import ResidentAdapter, RowAdapters
from server.engine.messages import Submit
from server.engine.prompt_cache import PromptMatch
from server.engine.requests import Reading, Request
from server.engine.scheduler import LoopOptions, Scheduler

ADAPTERS = {name: ResidentAdapter(name, "lora", 1, 1.0, (), 1) for name in "abcdef"}


def row(names: str) -> RowAdapters:
    return tuple((ADAPTERS[name], 1.0) for name in sorted(names))


def request(name: str, adapters: str = "", *, choices: int = 1, prompt: int = 1, like: str = "") -> Request:
    """A request whose prompt begins like nobody else's, but that of the request `like`."""
    first = zlib.crc32((like or name).encode()) // 2
    tokens = tuple(range(first, first + prompt))
    return Request.of(Submit(name, row(adapters), tokens, 1, frozenset(), choices=choices), seed=0)


def admit(scheduler: Scheduler, cached_tokens: int = 0) -> list[str]:
    """Start all that may start; the longer prompts of them are being read from then on.

    `cached_tokens` are kept of every prompt that is longer than that, for those that come now.
    """
    started = []

    def look_up(one: Request) -> PromptMatch:
        return PromptMatch(cached_tokens if len(one.submit.prompt_tokens) > cached_tokens else 0)

    for one in scheduler.admissible(look_up):
        scheduler.start(one, len(one.submit.prompt_tokens))
        for choice in one.open:
            one.uids[choice] = uid = hash((one.request_id, choice))
            if len(one.submit.prompt_tokens) > 1:
                left = [len(one.submit.prompt_tokens) - 1]
                scheduler.reading[uid] = Reading(one, 0, left, kept=True, anywhere=True, padded=True)
        started.append(one.request_id)
    return started


def end(scheduler: Scheduler, request_id: str) -> None:
    one = scheduler.running[request_id]
    for uid in one.uids.values():
        scheduler.reading.pop(uid, None)
    scheduler.end(one)


def adapters_of(scheduler: Scheduler) -> set[str]:
    return {adapter.digest for one in scheduler.running.values() for adapter in one.adapters}


def test_one_adapters_crowd_holds_up_anothers_only_request_by_no_more_than_the_next_free_row() -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=4))
    for number in range(300):
        scheduler.submit(request(f"a{number}", "a", prompt=50))
    crowd = admit(scheduler)
    scheduler.submit(request("b", "b", prompt=50))
    assert admit(scheduler) == []
    end(scheduler, crowd[2])
    assert admit(scheduler) == ["b"]


def test_a_request_that_would_bring_one_adapter_too_many_waits_and_others_go_first() -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=8, max_batch_adapters=2))
    for name, adapters in [
        ("1", "a"),
        ("2", "b"),
        ("3", "c"),
        ("4", "a"),
        ("5", ""),
        ("6", "ab"),
        ("7", "ad"),
    ]:
        scheduler.submit(request(name, adapters))
    assert sorted(admit(scheduler)) == ["1", "2", "4", "5", "6"]
    assert scheduler.batch_adapters == 2
    for name in ("2", "6"):
        end(scheduler, name)
    assert admit(scheduler) == ["3"]


def test_a_blend_of_more_adapters_than_the_limit_runs_when_they_are_the_only_ones() -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=8, max_batch_adapters=2))
    scheduler.submit(request("single", "d"))
    scheduler.submit(request("blend", "abc"))
    assert admit(scheduler) == ["single"]
    end(scheduler, "single")
    scheduler.submit(request("part", "b"))
    scheduler.submit(request("base", ""))
    assert admit(scheduler) == ["blend", "part", "base"]


def test_a_prompt_of_one_token_starts_beside_any_number_that_are_being_read() -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=8, prefill_batch_size=2))
    for number in range(4):
        scheduler.submit(request(f"long{number}", prompt=2000))
    assert admit(scheduler) == ["long0", "long1"]
    scheduler.submit(request("short", "a"))
    assert admit(scheduler) == ["short"]


@pytest.mark.parametrize("followers", [1, 5, 20])
def test_requests_that_wait_for_anothers_reading_hold_up_no_other_of_their_key(followers: int) -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=64, prefill_batch_size=8))
    scheduler.submit(request("reader", prompt=1000))
    assert admit(scheduler) == ["reader"]
    names = [f"follower{number}" for number in range(followers)]
    for name in names:
        scheduler.submit(request(name, prompt=900, like="reader"))
    scheduler.submit(request("own", prompt=900))
    scheduler.submit(request("other", "a", prompt=900))
    assert set(admit(scheduler)) == {"own", "other"}
    for reading in scheduler.reading.values():
        if reading.request.request_id == "reader":
            assert reading.wanted == 899
            reading.advance(899)
    assert admit(scheduler, cached_tokens=899) == names


@pytest.mark.parametrize("read", [0, 599, 600])
def test_nobody_waits_for_a_reading_that_is_behind_what_is_cached_for_him(read: int) -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=8))
    scheduler.submit(request("reader", prompt=1000))
    admit(scheduler)
    (reading,) = scheduler.reading.values()
    if read:
        reading.advance(read)
    scheduler.submit(request("further", prompt=900, like="reader"))
    assert admit(scheduler, cached_tokens=600) == ([] if read >= 600 else ["further"])


@pytest.mark.parametrize("decoding", [0, 4])
def test_what_is_read_in_a_step_is_bounded_while_others_decode(decoding: int) -> None:
    scheduler = Scheduler(LoopOptions(max_batch_size=16, prefill_batch_size=8, prefill_step_tokens=64))
    for number in range(decoding):
        scheduler.submit(request(f"short{number}"))
    for number in range(8):
        scheduler.submit(request(f"long{number}", "abcdef"[number % 6], prompt=2000))
    admit(scheduler)
    rows = len(scheduler.reading)
    assert scheduler.decoding_rows == decoding
    assert rows >= 6  # none of six adapters has to wait for another's prompt
    assert scheduler.step_tokens() * rows <= (8 * 64 if decoding == 0 else 256)


def crowd(first: str) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{first}{number}"


LIMITS = st.one_of(st.none(), st.integers(1, 3))
KINDS = st.tuples(
    st.text("abcdef", max_size=3).map(lambda text: "".join(sorted(set(text)))), st.integers(1, 6)
)


@settings(max_examples=60, deadline=None)
@given(LIMITS, st.lists(KINDS, min_size=1, max_size=5), KINDS, st.randoms(use_true_random=False))
def test_nobody_starves_whatever_keeps_coming(
    limit: int | None, others: list[tuple[str, int]], mine: tuple[str, int], random: Random
) -> None:
    """Requests of every other kind wait at all times; the one that is looked at starts all the same."""
    scheduler = Scheduler(LoopOptions(max_batch_size=4, max_batch_adapters=limit))
    names = crowd("other")
    running: deque[str] = deque()

    def fill() -> None:
        waiting = [(one.adapters, len(one.open)) for one in scheduler.waiting]
        for adapters, choices in others:
            kind = (frozenset(ADAPTERS[name] for name in adapters), choices)
            for _ in range(2 - waiting.count(kind)):
                scheduler.submit(request(next(names), adapters, choices=choices, prompt=1))

    fill()
    running.extend(admit(scheduler))
    scheduler.submit(request("mine", mine[0], choices=mine[1]))
    for _ in range(400):
        fill()
        running.extend(admit(scheduler))
        if "mine" in running:
            return
        taken = adapters_of(scheduler)
        assert limit is None or len(taken) <= max(limit, 3)
        assert sum(len(one.open) for one in scheduler.running.values()) <= 6
        over = running[random.randrange(len(running))]
        running.remove(over)
        scheduler.waiting.charge_output(scheduler.running[over].share, 5)
        end(scheduler, over)
    raise AssertionError(f"never started; overtaken {scheduler.waiting.get('mine')}")

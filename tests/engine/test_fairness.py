"""Virtual token counters: in order within a key, fair between keys, nothing remembered of the idle."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import INPUT_WEIGHT, MAX_STARTS_OF_OTHERS, OUTPUT_WEIGHT, FairQueue


def order(queue: FairQueue[str], read_tokens: int = 10) -> list[str]:
    """Everything that waits, in the order in which it is started."""
    started = []
    for item in queue.heads():
        queue.start(item, read_tokens)
        started.append(item)
    return started


def filled(*items: str) -> FairQueue[str]:
    """Items whose first letter is their key."""
    queue: FairQueue[str] = FairQueue()
    for item in items:
        queue.push(item[0], item, item)
    return queue


def test_one_key_is_first_come_first_served() -> None:
    assert order(filled("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_keys_take_turns_however_many_of_one_wait() -> None:
    popular = [f"a{i}" for i in range(300)]
    assert order(filled(*popular, "b1", "c1", "b2"))[:6] == ["a0", "b1", "c1", "a1", "b2", "a2"]


def test_a_key_that_comes_late_is_next_but_gains_no_more_than_that() -> None:
    queue = filled(*(f"a{i}" for i in range(100)))
    for item in list(queue)[:50]:
        queue.start(item, 1000)
    for number in range(50):
        queue.push("b", f"b{number}", f"b{number}")
    assert order(queue)[:6] == ["b0", "a50", "a51", "b1", "a52", "b2"]


def test_what_is_generated_counts_too() -> None:
    had = 10 * INPUT_WEIGHT + 6 * OUTPUT_WEIGHT
    for read_tokens, following in [(had - 1, "b2"), (had + 1, "a2")]:
        queue = filled("a1", "a2", "b1", "b2")
        queue.start("a1", 10)
        queue.charge_output("a", 6)
        queue.start("b1", read_tokens)
        assert next(queue.heads()) == following


def test_a_key_is_forgotten_when_it_neither_waits_nor_runs() -> None:
    queue = filled("a1", "b1")
    queue.start("a1", 500)
    queue.remove("b1")
    queue.end("a")
    queue.push("a", "a2", "a2")
    queue.push("c", "c1", "c1")
    assert list(queue.heads()) == ["a2", "c1"]  # had it been served, the newcomer would be next


def test_a_newcomer_does_not_sink_below_the_key_that_was_served_last() -> None:
    queue = filled("a1")
    queue.start("a1", 100)
    queue.charge_output("a", 50)
    for item in ("b1", "b2", "a2"):
        queue.push(item[0], item, item)
    queue.start("b1", 1)
    assert next(queue.heads()) == "a2"


def test_what_is_passed_by_gives_its_turn_to_the_next_of_its_key_alone() -> None:
    queue = filled("a1", "a2", "a3", "b1", "b2")
    passed: set[str] = set()
    seen = []
    for item in queue.heads(passed):
        seen.append(item)
        if item in ("a1", "a2"):
            passed.add(item)
    assert seen == ["a1", "a2", "a3", "b1"]
    assert list(queue.heads()) == ["a1", "b1"]


def test_an_endless_stream_of_new_keys_does_not_starve_one_that_has_been_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.push("crowd", f"crowd {number}", f"crowd {number}")
    started = []
    for number in range(2 * MAX_STARTS_OF_OTHERS + 10):
        for other in (f"new {number} a", f"new {number} b"):
            queue.push(other, other, other)
        started.append(queue.start(next(queue.heads()), 10))
    places = [place for place, item in enumerate(started) if item.startswith("crowd")]
    assert len(places) == 3
    # Others that have waited as long may come before it.
    assert max(after - before for before, after in pairwise(places)) < 2 * MAX_STARTS_OF_OTHERS


def test_unknown_ids_are_an_error_and_looking_them_up_is_none() -> None:
    queue = filled("a1")
    assert queue.get("a1") == "a1"
    assert queue.get("a2") is None
    with pytest.raises(KeyError):
        queue.remove("a2")
    with pytest.raises(KeyError):
        queue.start("a2", 1)
    assert queue.remove("a1") == "a1"
    assert not queue


def test_cancelling_among_thousands_does_not_look_at_them() -> None:
    def seconds(waiting: int) -> float:
        queue: FairQueue[int] = FairQueue()
        for number in range(waiting):
            queue.push(number % 50, str(number), number)
        started = time.perf_counter()
        for number in range(waiting - 500, waiting):
            queue.remove(str(number))
        return time.perf_counter() - started

    small, large = min(seconds(1000) for _ in range(5)), min(seconds(40_000) for _ in range(5))
    assert large < 10 * small


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 100)), min_size=1, max_size=80), st.data())
def test_backlogged_keys_are_served_alike(requests: list[tuple[str, int]], data: st.DataObject) -> None:
    """The paper's bound: keys that wait differ in service by less than twice the largest request."""
    queue: FairQueue[str] = FairQueue()
    sizes: dict[str, int] = {}
    for number, (key, size) in enumerate(requests):
        item = f"{key}{number}"
        sizes[item] = size
        queue.push(key, item, item)
    bound = 2 * max(sizes.values())
    served = dict.fromkeys("abcd", 0)
    while queue:
        counters = [served[key] for key in {item[0] for item in queue}]
        assert max(counters) - min(counters) <= bound
        item = next(queue.heads())
        assert served[item[0]] == min(counters)
        if data.draw(st.booleans()):
            queue.start(item, sizes[item])
            served[item[0]] += INPUT_WEIGHT * sizes[item]
        else:
            queue.remove(item)

"""Reading takes its measure from decoding; prompts are read as rectangles that waste little."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pacing import LinearFit, Pace, first_read

FULL = 8 * 512
LONG = [5000]


def measured(fixed: float, for_a_row: float, for_a_token: float) -> Pace:
    """A pace that has seen forwards that cost so many seconds, and so many more for each row or token."""
    pace = Pace(min_tokens=32, max_tokens=2048)
    for size in (1, 2, 8, 16):
        pace.observe(fixed + size * for_a_row, decoded_rows=size, read_tokens=0)
        pace.observe(fixed + 30 * size * for_a_token, decoded_rows=0, read_tokens=30 * size)
    return pace


@pytest.mark.parametrize("rows", [4, 12, 24])
def test_reading_takes_as_long_as_four_steps_of_decoding_where_nothing_is_fixed(rows: int) -> None:
    for for_a_row, for_a_token in [(0.0072, 0.0032), (0.0001, 0.00005)]:
        budget = measured(0.0, for_a_row, for_a_token).budget_tokens(LONG, rows)
        assert budget * for_a_token == pytest.approx(max(4 * rows * for_a_row, 32 * for_a_token), rel=0.05)


@pytest.mark.parametrize(("fixed", "times"), [(0.005, 20), (0.05, 20), (0.3, 10)])
def test_a_gap_that_cannot_be_shorter_is_worth_it(fixed: float, times: int) -> None:
    pace = Pace(min_tokens=32, max_tokens=65536)
    for size in (1, 2, 8, 16):
        pace.observe(0.01, decoded_rows=size, read_tokens=0)
        pace.observe(fixed + 30 * size * 1e-4, decoded_rows=0, read_tokens=30 * size)
    budget = pace.budget_tokens([100000], 8)
    assert budget * 1e-4 == pytest.approx(times * fixed, rel=0.05)
    assert pace.forward_tokens == pytest.approx(fixed / 1e-4, rel=0.05)


def test_a_compilers_seconds_count_as_an_outlier() -> None:
    pace = measured(0.01, 0.0001, 0.00005)
    budget = pace.budget_tokens(LONG, 8)
    pace.observe(20.0, decoded_rows=0, read_tokens=200)
    for size in (1, 2, 8, 16) * 4:
        pace.observe(0.01 + 30 * size * 0.00005, decoded_rows=0, read_tokens=30 * size)
    assert pace.budget_tokens(LONG, 8) == pytest.approx(budget, rel=0.3)


def test_a_compilers_seconds_are_forgotten_though_they_come_first() -> None:
    pace = Pace(min_tokens=32, max_tokens=2048)
    pace.observe(15.0, decoded_rows=1, read_tokens=0)
    pace.observe(20.0, decoded_rows=0, read_tokens=200)
    for size in (1, 2, 8, 16):
        pace.observe(0.01 + size * 0.0001, decoded_rows=size, read_tokens=0)
        pace.observe(0.01 + 30 * size * 0.00005, decoded_rows=0, read_tokens=30 * size)
    assert pace.budget_tokens(LONG, 8) == measured(0.01, 0.0001, 0.00005).budget_tokens(LONG, 8)


def test_idle_reading_is_bounded_by_a_second() -> None:
    pace = Pace(min_tokens=32, max_tokens=16384)
    assert pace.idle_tokens == 4096  # nothing is known yet
    for size in (1, 2, 8, 16):
        pace.observe(size / 10, decoded_rows=0, read_tokens=30 * size)
    assert pace.idle_tokens == pytest.approx(300, rel=0.01)


def test_the_budget_is_kept_within_its_limits() -> None:
    assert measured(0.001, 0.0, 0.01).budget_tokens(LONG, 8) == 32
    assert measured(1.0, 0.1, 0.001).budget_tokens(LONG, 8) == 2048
    assert Pace(min_tokens=32, max_tokens=64).budget_tokens(LONG, 8) == 64  # nothing is known yet


def test_prompts_that_can_be_finished_together_are_worth_a_longer_gap() -> None:
    pace = measured(0.043, 0.0072, 0.0032)
    usual = pace.budget_tokens([2000] * 7, 9)
    assert usual < pace.budget_tokens([90] * 7, 9) == 90 * 7
    assert pace.budget_tokens([600], 12) < 600
    assert pace.budget_tokens([600], 4) == 600


def test_reading_and_decoding_in_one_step_are_told_apart() -> None:
    pace = measured(0.04, 0.005, 0.001)
    for _ in range(200):
        pace.observe(0.04 + 8 * 0.005 + 0.04 + 100 * 0.003, decoded_rows=8, read_tokens=100)
    slower = pace.budget_tokens(LONG, 8)
    assert slower < 0.8 * measured(0.04, 0.005, 0.001).budget_tokens(LONG, 8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-4, 10)), min_size=1, max_size=30))
def test_a_line_never_falls_and_never_starts_below_nought(points: list[tuple[int, float]]) -> None:
    line = LinearFit()
    for size, seconds in points:
        line.observe(size, seconds)
    assert line.seconds(0) >= -1e-9
    assert line.seconds(400) >= line.seconds(10) - 1e-9


def test_a_line_keeps_its_fixed_part_while_one_size_comes_for_long() -> None:
    line = LinearFit()
    for size in (10, 1000):
        line.observe(size, 3 + size)
    for _ in range(1000):
        line.observe(100, 103)
    assert line.fixed_seconds == pytest.approx(3)


def test_nothing_new_is_read_until_rows_had_their_share_of_the_time() -> None:
    pace = measured(0.01, 0.001, 0.001)
    decoding = 0.01 + 8 * 0.001
    pace.observe(decoding + 1.0, decoded_rows=8, read_tokens=1000, waiting_rows=0)
    steps = 0
    while pace.rests:
        pace.observe(decoding, decoded_rows=8, read_tokens=0)
        steps += 1
    assert steps * decoding == pytest.approx(0.25, abs=decoding)
    pace.observe(decoding + 1.0, decoded_rows=1, read_tokens=1000, waiting_rows=31)
    pace.observe(decoding, decoded_rows=1, read_tokens=0)
    assert not pace.rests


def test_a_line_forgets() -> None:
    line = LinearFit()
    for _ in range(300):
        for size in (10, 20):
            line.observe(size, 5.0 * size)
    for _ in range(300):
        for size in (10, 20):
            line.observe(size, 1.0 + size)
    assert line.seconds(40) == pytest.approx(41, rel=0.01)
    assert line.size(31) == pytest.approx(30, rel=0.01)


LEFT = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(LEFT, st.integers(1, FULL), st.integers(1, 600))
def test_a_read_is_within_its_bounds(left: list[int], budget: int, most: int) -> None:
    step = first_read(left, budget, most)
    assert 1 <= step <= min(most, max(left))
    assert step * len(left) <= max(1.25 * budget, len(left))


@settings(max_examples=100, deadline=None)
@given(LEFT)
def test_reading_in_this_order_never_costs_more_than_padding_everything(left: list[int]) -> None:
    padded = len(left) * min(max(left), 512) + 64
    cost, remaining, end = 0, [min(one, 512) for one in left], 0
    while remaining:
        step = first_read(remaining, FULL, 512)
        cost += step * len(remaining) + 64
        remaining = [one - step for one in remaining if one > step]
        end += 1
    assert cost <= padded


def test_like_lengths_are_read_together_and_unlike_ones_apart() -> None:
    assert first_read([44, 45, 43, 48], FULL, 512) == 48
    assert first_read([44, 45, 43, 2000], FULL, 512) == 45
    assert first_read([2000], FULL, 512) == 512


def test_a_little_more_than_the_budget_finishes_prompts_in_one_step() -> None:
    assert first_read([44, 44], 80, 512) == 44
    assert first_read([60, 60], 80, 512) == 40

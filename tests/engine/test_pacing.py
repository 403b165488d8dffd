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
    pace = Pace(min_tokens=32, max_tokens=512)
    for size in (1, 2, 8, 16):
        pace.observe(fixed + size * for_a_row, decoded_rows=size, read_tokens=0)
        pace.observe(fixed + 30 * size * for_a_token, decoded_rows=0, read_tokens=30 * size)
    return pace


@pytest.mark.parametrize("rows", [4, 12, 24])
def test_reading_takes_about_twice_as_long_as_decoding(rows: int) -> None:
    for fixed, for_a_row, for_a_token in [(0.043, 0.0072, 0.0032), (0.01, 0.0001, 0.00005)]:
        budget = measured(fixed, for_a_row, for_a_token).budget_tokens(LONG, rows)
        wanted = 2 * (fixed + rows * for_a_row)
        assert budget == 512 or fixed + budget * for_a_token == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("fixed", [0.05, 0.3])
def test_a_gap_that_cannot_be_shorter_is_worth_it(fixed: float) -> None:
    pace = Pace(min_tokens=32, max_tokens=16384)
    for size in (1, 2, 8, 16):
        pace.observe(0.01, decoded_rows=size, read_tokens=0)
        pace.observe(fixed + 30 * size * 1e-4, decoded_rows=0, read_tokens=30 * size)
    budget = pace.budget_tokens([100000], 8)
    assert budget * 1e-4 == pytest.approx(fixed, rel=0.05)
    assert pace.forward_tokens == pytest.approx(fixed / 1e-4, rel=0.05)


def test_a_compilers_seconds_count_as_an_outlier() -> None:
    pace = measured(0.01, 0.0001, 0.00005)
    budget = pace.budget_tokens(LONG, 8)
    pace.observe(20.0, decoded_rows=0, read_tokens=200)
    for size in (1, 2, 8, 16) * 4:
        pace.observe(0.01 + 30 * size * 0.00005, decoded_rows=0, read_tokens=30 * size)
    assert pace.budget_tokens(LONG, 8) == pytest.approx(budget, rel=0.3)


def test_a_compilers_seconds_are_forgotten_though_they_come_first() -> None:
    pace = Pace(min_tokens=32, max_tokens=512)
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
    assert measured(1.0, 0.1, 0.001).budget_tokens(LONG, 8) == 512
    assert Pace(min_tokens=32, max_tokens=64).budget_tokens(LONG, 8) == 64  # nothing is known yet


def test_prompts_that_can_be_finished_together_are_worth_a_longer_gap() -> None:
    pace = measured(0.043, 0.0072, 0.0032)
    assert pace.budget_tokens([45] * 7, 9) == 45 * 7
    assert pace.budget_tokens([2000] * 7, 9) < 100
    assert pace.budget_tokens([300], 12) < 100


def test_reading_and_decoding_in_one_step_are_told_apart() -> None:
    pace = measured(0.04, 0.005, 0.001)
    for _ in range(200):
        pace.observe(0.04 + 8 * 0.005 + 0.04 + 100 * 0.003, decoded_rows=8, read_tokens=100)
    slower = pace.budget_tokens(LONG, 8)
    assert slower < 0.6 * measured(0.04, 0.005, 0.001).budget_tokens(LONG, 8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-4, 10)), min_size=1, max_size=30))
def test_a_line_never_falls_and_never_starts_below_nought(points: list[tuple[int, float]]) -> None:
    line = LinearFit()
    for size, seconds in points:
        line.observe(size, seconds)
    assert line.seconds(0) >= -1e-9
    assert line.seconds(400) >= line.seconds(10) - 1e-9


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

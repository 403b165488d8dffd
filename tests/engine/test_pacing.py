"""Reading takes its measure from decoding; prompts are read as rectangles that waste little."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pacing import Pace, first_read

FULL = 8 * 512


def measured(decode_seconds: float, tokens_per_second: float) -> Pace:
    pace = Pace(min_tokens=32, max_tokens=512)
    pace.observe(100 / tokens_per_second, decoded_rows=0, read_tokens=100)
    pace.observe(decode_seconds, decoded_rows=8, read_tokens=0)
    return pace


@pytest.mark.parametrize(("decode_seconds", "tokens_per_second"), [(0.16, 313), (0.01, 20_000), (0.05, 2000)])
def test_reading_takes_about_twice_as_long_as_decoding(
    decode_seconds: float, tokens_per_second: float
) -> None:
    pace = measured(decode_seconds, tokens_per_second)
    budget = pace.budget_tokens(decoding_rows=100, joining_rows=1)
    assert budget / tokens_per_second == pytest.approx(2 * decode_seconds, rel=0.05)


def test_the_budget_is_kept_within_its_limits() -> None:
    assert measured(0.001, 100).budget_tokens(decoding_rows=8, joining_rows=1) == 32
    assert measured(1.0, 100_000).budget_tokens(decoding_rows=8, joining_rows=1) == 512


def test_many_that_wait_to_join_few_are_read_faster() -> None:
    pace = measured(0.05, 2000)
    few, many = (pace.budget_tokens(decoding_rows=8, joining_rows=joining) for joining in (1, 8))
    assert many > 1.5 * few


def test_reading_and_decoding_in_one_step_are_told_apart() -> None:
    pace = measured(0.1, 1000)
    for _ in range(40):
        pace.observe(0.1 + 0.4, decoded_rows=8, read_tokens=200)
    assert pace.read_tokens_per_second == pytest.approx(500, rel=0.01)
    assert pace.decode_seconds == pytest.approx(0.1)


def test_a_slower_machine_reads_less() -> None:
    """Small reads are less efficient, which must not shrink the budget for ever."""
    pace, tokens = measured(0.1, 1000), 0
    for _ in range(60):
        tokens = pace.budget_tokens(decoding_rows=100, joining_rows=1)
        pace.observe(0.1 + 0.05 + tokens / 1000, decoded_rows=8, read_tokens=tokens)
    assert 0.05 + tokens / 1000 == pytest.approx(0.2, rel=0.05)


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

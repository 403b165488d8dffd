"""The cases as they are declared: names, goals, sizes."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.cases import CASES, GPU_TABLE, TABLE, choose
from benchmarks.cases.zipf import draws
from benchmarks.runner import measures_of
from benchmarks.sizes import GOAL_SIZES, GPU_SIZES, QUICK_SIZES, Sizes


@pytest.mark.parametrize("sizes", [GOAL_SIZES, GPU_SIZES, QUICK_SIZES])
def test_every_case_bears_its_name_and_shares_no_measures_name_within_its_stage(sizes: Sizes) -> None:
    stages: dict[str, list] = {}
    for name, build in CASES.items():
        case = build(sizes)
        assert case.name == name
        assert case == build(sizes) or case.measures == build(sizes).measures
        stages.setdefault(case.measured_with, []).append(case)
    for cases in stages.values():
        names = [measure.name for measure in measures_of(cases, 1)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("sizes", "least", "most"),
    [
        (
            GOAL_SIZES,
            [0.95, 0.92, 0.95, 0.85, 1.0, 1.0, 1.1, 7, 12, 0.97, 0.85],
            [1.1, 1.0, 1.1, 3, 0.15, 1.1, 2],
        ),
        (
            GPU_SIZES,
            # traffic; loop; mixes of 32, 8 and 1 rows; adapters; peer; overhead; zipf
            [0.95]
            + [0.95] * 4
            + [0.95, 0.9, 0.9, 0.95]
            + [0.9] * 5
            + [0.85] * 2
            + [0.95, 0.85]
            + [1.1] * 4
            + [0.97, 0.85],
            [1.1, 1.0, 1.2, 1.1, 1.1, 1.0, 1, 1.0, 1.0, 1.0, 1.0, 1.1, 3, 0.15, 1.1, 2],
        ),
    ],
)
def test_the_table_has_every_goal(sizes: Sizes, least: list[float], most: list[float]) -> None:
    figures = [figure for case in choose((), sizes) for figure in case.figures]
    goals = [figure.goal for figure in figures if figure.goal]
    assert [goal.bound for goal in goals if goal.at_least] == least
    assert [goal.bound for goal in goals if not goal.at_least] == most
    assert len({figure.label for figure in figures}) == len(figures)


def test_cases_are_chosen_by_name_once_each() -> None:
    assert [case.name for case in choose((), GOAL_SIZES)] == list(TABLE)
    assert [case.name for case in choose((), GPU_SIZES)] == list(GPU_TABLE)
    assert [case.name for case in choose(("zipf", "prefix", "zipf"), GOAL_SIZES)] == ["zipf", "prefix"]
    assert [case.name for case in choose(("all",), GOAL_SIZES)] == list(CASES)
    with pytest.raises(ValueError, match=r"expected cases among all, traffic, .*, got everything"):
        choose(("everything", "zipf"), GOAL_SIZES)


def test_draws_follow_zipfs_law_and_the_seed() -> None:
    drawn = Counter(draws(100, 50_000, seed=1))
    assert drawn[0] / drawn[9] == pytest.approx(10, rel=0.2)
    assert set(drawn) <= set(range(100))
    assert draws(100, 20, seed=2) == draws(100, 20, seed=2) != draws(100, 20, seed=3)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected cycles to be at least 1, got 0"):
        Sizes(cycles=0)
    with pytest.raises(ValueError, match=r"at most as many resident adapters .* got 64 of 8"):
        Sizes(registered=8)

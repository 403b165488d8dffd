"""Stages, rounds and figures, with measures that start nothing."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.adapters import RANK_16_ALL
from benchmarks.case import Case, Figure, Goal, Measure, Sample, Term
from benchmarks.library import AdapterLibrary
from benchmarks.loads import LoadMeasure, stories
from benchmarks.report import agreement, figure_spread
from benchmarks.runner import measures_of, order_of_round, run_cases, run_rounds, share_of
from benchmarks.sides import Side, SideContext, SideKind, SideSpec
from benchmarks.summary import Statistic, percentile, spread

SPEC = SideSpec(SideKind.GRAFT)


@dataclass(frozen=True)
class Written:
    """A measure that writes down what is done with it, and gives as many values as it is told."""

    name: str
    log: list[str] = field(compare=False)
    value: float = 1.0
    side: SideSpec = SPEC
    asked: Hashable = None

    async def prepare(self, side: object) -> None:
        self.log.append(f"prepare {self.name}")

    async def run(self, side: object, round_index: int) -> Sample:
        self.log.append(f"{self.name} {round_index}")
        return Sample({"x": (self.value * round_index, self.value)})


def case(*measures: Written, name: str = "one", rounds: int | None = None, stage: str = "") -> Case:
    return Case(name, "about", measures, rounds=rounds, stage=stage)


async def test_rounds_interleave_and_every_second_runs_backwards() -> None:
    log: list[str] = []
    first, second, once = (Written(name, log) for name in ("first", "second", "once"))
    measures = measures_of([case(first, second), case(second, once, name="two", rounds=1)], 3)
    assert measures == {first: 3, second: 3, once: 1}
    samples = await run_rounds(measures, {SPEC: None}, lambda text: None)  # type: ignore[dict-item]
    expected = ["prepare first", "prepare second", "prepare once", "first 1", "second 1", "once 1"]
    assert log == [*expected, "second 2", "first 2", "first 3", "second 3"]
    assert {measure.name: sorted(rounds) for measure, rounds in samples.items()} == {
        "first": [1, 2, 3],
        "second": [1, 2, 3],
        "once": [1],
    }


async def test_when_the_time_is_up_the_first_round_is_still_whole() -> None:
    log: list[str] = []
    first, second = Written("first", log), Written("second", log)
    told: list[str] = []
    sides = {SPEC: None}
    samples = await run_rounds({first: 3, second: 3}, sides, told.append, until=0.0)  # type: ignore[arg-type]
    assert {measure.name: sorted(rounds) for measure, rounds in samples.items()} == {
        "first": [1],
        "second": [1],
    }
    assert "no time for round 3 of 3, second" in told


async def test_stages_with_a_peer_run_last(tmp_path: Path) -> None:
    context = SideContext(tmp_path / "none", AdapterLibrary(tmp_path, tmp_path / "a", 0), tmp_path, 0.3, 60)
    kinds = (SideKind.MLX_LM, SideKind.BARE)
    cases = [Case(str(kind), "", (LoadMeasure(SideSpec(kind), 1, 1),)) for kind in kinds]
    told: list[str] = []
    outcomes = await run_cases(cases, context, 1, told.append)
    assert [outcome.case.name for outcome in outcomes] == [str(kind) for kind in kinds]
    assert told[0].startswith("[1/2] BatchGenerator: ")
    assert told[-1].startswith("[2/2] mlx_lm.server: failed")


def test_stages_share_the_time_by_what_their_rounds_take() -> None:
    short, long, once = (
        Case(name, "", (), round_seconds=seconds, rounds=rounds)
        for name, seconds, rounds in (("short", 1, None), ("long", 3, None), ("once", 4, 1))
    )
    assert share_of([short], [short, long, once], 4) == 4 / (4 + 12 + 4)
    assert share_of([long], [long, once], 4) == 12 / (12 + 4)
    assert share_of([long, once], [long, once], 4) == 1


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_order_of_a_round_has_all_measures_and_the_next_is_its_mirror(count: int, index: int) -> None:
    measures = [Written(str(number), []) for number in range(count)]
    order = order_of_round(measures, index)
    assert sorted(measure.name for measure in order) == sorted(measure.name for measure in measures)
    assert order_of_round(measures, index + 1) == order[::-1]


async def test_a_stage_that_fails_leaves_the_others(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Unasked(LoadMeasure):
        async def prepare(self, side: Side) -> None: ...

        async def run(self, side: Side, round_index: int) -> Sample:
            return Sample({"x": (1.0,)})

    context = SideContext(tmp_path / "none", AdapterLibrary(tmp_path, tmp_path / "a", 0), tmp_path, 60, 60)
    broken = LoadMeasure(SideSpec(SideKind.BARE), 1, 1)
    cases = [
        Case("bad", "", (broken,), stage="bad"),
        Case("good", "", (Unasked(SideSpec(SideKind.BARE), 2, 1),)),
        Case("bad too", "", (broken,), stage="bad"),
    ]
    told: list[str] = []
    outcomes = await run_cases(cases, context, 1, told.append)
    assert [outcome.case.name for outcome in outcomes] == ["bad", "good", "bad too"]
    assert [bool(outcome.samples) for outcome in outcomes] == [False, True, False]
    assert outcomes[0].failure is not None
    assert outcomes[0].failure == outcomes[2].failure
    assert "BatchGenerator" in outcomes[0].failure
    assert any(line.startswith("[1/2] bad: failed") for line in told)


def test_a_figure_divides_round_by_round_over_the_rounds_that_both_ran() -> None:
    above, below = Written("above", []), Written("below", [])
    samples: dict[Measure, dict[int, Sample]] = {
        above: {1: Sample({"x": (30.0, 10.0, 20.0)}), 2: Sample({"x": (9.0,)}), 3: Sample({"x": (8.0,)})},
        below: {1: Sample({"x": (10.0,)}), 3: Sample({"x": (1.0, 2.0)})},
    }
    figure = Figure("f", Term(above, "x", Statistic.LARGEST), Term(below, "x"))
    rounds, found = figure_spread(figure, samples)
    assert rounds == [1, 3]
    assert found.values == (3.0, 8.0 / 1.5)
    assert figure_spread(Figure("f", Term(above, "x")), samples)[1].values == (20.0, 9.0, 8.0)
    with pytest.raises(ValueError, match="expected below to give y, it gave x"):
        figure_spread(Figure("f", Term(below, "y")), samples)
    with pytest.raises(ValueError, match="at least one value"):
        figure_spread(figure, {**samples, below: {}})


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_goal_is_reached_on_its_bound_and_on_one_side(bound: float, value: float) -> None:
    least, most = Goal(bound, at_least=True), Goal(bound, at_least=False)
    assert least.reached(bound)
    assert most.reached(bound)
    assert least.reached(value) is (value >= bound)
    assert most.reached(value) is (value <= bound)


def test_a_case_takes_the_measures_of_its_figures() -> None:
    measure, other = Written("measure", []), Written("other", [])
    with pytest.raises(ValueError, match="expected the case one to take other"):
        Case("one", "", (measure,), (Figure("f", Term(measure, "x"), Term(other, "x")),))


@given(st.lists(st.floats(0.01, 1e6), min_size=1))
def test_statistics_lie_among_the_values_and_know_no_order(values: list[float]) -> None:
    found = spread(values)
    assert found.lowest <= found.median <= found.highest
    assert found.values == tuple(values)
    for statistic in Statistic:
        assert statistic.of(values) == statistic.of(sorted(values))
    assert (
        found.median <= Statistic.P95.of(values) <= Statistic.P99.of(values) <= Statistic.LARGEST.of(values)
    )


@given(st.lists(st.integers(0, 99), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_first_value_that_so_many_do_not_exceed(values: list[int], percent: int) -> None:
    found = percentile(values, percent)
    assert sum(value <= found for value in values) >= len(values) * percent / 100
    assert sum(value < found for value in values) < len(values) * percent / 100


def test_agreement_counts_equal_texts() -> None:
    left = {1: Sample({}, (" a", "b")), 2: Sample({}, ("c",))}
    right = {1: Sample({}, ("a", "x"))}
    assert agreement(left, right) == (1, 2)


@given(st.integers(0, 99), st.integers(0, 9), st.integers(0, 99), st.integers(0, 9))
def test_no_two_series_or_rounds_share_a_question(
    index: int, series: int, other_index: int, other_series: int
) -> None:
    ours, theirs = stories(index, 4, 8, series), stories(other_index, 4, 8, other_series)
    starts = {question.system.split()[0] for question in [*ours, *theirs]}
    same = (index, series) == (other_index, other_series)
    assert len(starts) == (4 if same else 8)
    assert {len(start) for start in starts} == {7}
    assert [question.prompt for question in ours] == [question.prompt for question in theirs]


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_mixed_load_asks_the_base_loads_questions_of_all_adapters_evenly(
    requests: int, adapters: int
) -> None:
    base = LoadMeasure(SPEC, requests, 8).ask(1)
    mixed = LoadMeasure(SPEC, requests, 8, adapters, RANK_16_ALL).ask(1)
    assert [question.messages for question in base] == [question.messages for question in mixed]
    assert {question.adapter for question in base} == {None}
    dealt = [question.adapter for question in mixed]
    counts = {name: dealt.count(name) for name in dealt}
    assert len(counts) == min(requests, adapters)
    assert max(counts.values()) - min(counts.values()) <= 1

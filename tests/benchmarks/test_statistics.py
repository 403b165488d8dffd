"""Cases, loads, rounds and ratios: the parts of the benchmarks that start nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cases import CASES, LoadName, Measure, Question, Ratio, SideName, make_loads, measures_of
from benchmarks.prompts import prompts
from benchmarks.results import Answer, LoadResult, agreement, ratio_result, spread
from benchmarks.runner import order_of_round, run_rounds

GRAFT = Measure(SideName.GRAFT, LoadName.MIXED)
MLX_LM = Measure(SideName.MLX_LM, LoadName.MIXED)


def result(tokens: Sequence[int], seconds: float, texts: Sequence[str] = ()) -> LoadResult:
    texts = texts or [""] * len(tokens)
    answers = [Answer(text, 9, 0, count, 0.5, 1.0) for text, count in zip(texts, tokens, strict=True)]
    return LoadResult(seconds, tuple(answers))


@given(st.integers(1, 40), st.integers(1, 12))
def test_no_question_is_asked_twice(count: int, rounds: int) -> None:
    asked = [prompt for index in range(rounds) for prompt in prompts(index, count)]
    assert len(asked) == len(set(asked)) == count * rounds
    assert asked == [prompt for index in range(rounds) for prompt in prompts(index, count)]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 9))
def test_the_mixed_load_asks_the_base_loads_questions_of_all_adapters_evenly(
    requests: int, adapters: int, index: int
) -> None:
    loads = make_loads(requests, adapters, 24)
    base, mixed = (loads[name].questions(index) for name in (LoadName.BASE, LoadName.MIXED))
    assert [question.prompt for question in base] == [question.prompt for question in mixed]
    assert {question.adapter for question in base} == {None}
    dealt = Counter(question.adapter for question in mixed)
    assert set(dealt) == set(range(min(requests, adapters)))
    assert max(dealt.values()) - min(dealt.values()) <= 1


def test_every_measure_of_the_cases_is_taken_once() -> None:
    measures = measures_of(CASES.values())
    needed = {
        measure
        for case in CASES.values()
        for ratio in case.ratios
        for measure in (ratio.numerator, ratio.denominator)
    }
    assert len(measures) == len(set(measures))
    assert set(measures) == needed
    assert {measure.side for measure in measures} == set(SideName)


@given(st.integers(1, 9))
def test_every_order_of_a_round_has_all_measures_and_the_next_is_its_mirror(index: int) -> None:
    measures = measures_of(CASES.values())
    order = order_of_round(measures, index)
    assert set(order) == set(measures)
    assert order_of_round(measures, index + 1) == order[::-1]


def test_a_rate_counts_the_tokens_of_all_answers() -> None:
    assert result([24, 10, 2], 4.0).tokens_per_second == 9.0


def test_a_ratio_divides_round_by_round_over_the_rounds_that_both_ran() -> None:
    above = {1: result([30], 1.0), 2: result([60], 1.0), 3: result([90], 1.0)}
    below = {1: result([10], 1.0), 3: result([45], 1.0)}
    found = ratio_result(Ratio("r", GRAFT, MLX_LM), {GRAFT: above, MLX_LM: below})
    assert found.rounds == (1, 3)
    assert found.spread.values == (3.0, 2.0)
    assert (found.spread.median, found.spread.lowest, found.spread.highest) == (2.5, 2.0, 3.0)


def test_a_ratio_without_a_common_round_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        ratio_result(Ratio("r", GRAFT, MLX_LM), {GRAFT: {1: result([1], 1.0)}, MLX_LM: {}})


@given(st.lists(st.floats(0.01, 1e6), min_size=1), st.randoms())
def test_the_spread_holds_the_median_and_knows_no_order(values: list[float], random: object) -> None:
    found = spread(values)
    assert found.lowest <= found.median <= found.highest
    assert spread(sorted(values)).median == found.median
    assert found.values == tuple(values)


def test_agreement_counts_equal_texts() -> None:
    left = {1: result([1, 1], 1.0, [" a", "b"]), 2: result([1], 1.0, ["c"])}
    right = {1: result([1, 1], 1.0, ["a", "x"])}
    assert agreement(left, right) == (1, 2)


class Recorded:
    """A side that takes a given time for every load and keeps what it was asked, in a shared list."""

    def __init__(self, name: str, seconds: float, asked: list[tuple[str, list[Question]]]) -> None:
        self.name = name
        self.seconds = seconds
        self.asked = asked

    async def run(self, questions: Sequence[Question]) -> LoadResult:
        self.asked.append((self.name, list(questions)))
        return result([1] * len(questions), self.seconds)


async def test_rounds_interleave_after_a_warm_up_of_each_and_a_slow_side_stops_early() -> None:
    asked: list[tuple[str, list[Question]]] = []
    sides = {
        SideName.GRAFT: Recorded("fast", 1.0, asked),
        SideName.MLX_LM: Recorded("slow", 40.0, asked),
    }
    results, notes = await run_rounds(
        [GRAFT, MLX_LM], sides, make_loads(4, 2, 24), rounds=4, side_seconds=100.0, progress=lambda text: None
    )
    assert [name for name, _ in asked] == ["fast", "slow", "fast", "slow", "slow", "fast", "fast", "fast"]
    assert (sorted(results[GRAFT]), sorted(results[MLX_LM])) == ([1, 2, 3, 4], [1, 2])
    assert len(notes) == 1
    assert "2 of 4 rounds" in notes[0]
    warm_up, measured = asked[:2], asked[2:]
    assert {question.max_tokens for _, questions in measured for question in questions} == {24}
    assert {question.max_tokens for _, questions in warm_up for question in questions} == {8}
    warm = {question.prompt for _, questions in warm_up for question in questions}
    assert warm.isdisjoint(question.prompt for _, questions in measured for question in questions)

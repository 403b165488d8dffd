"""Runs cases: starts the sides they need, warms each up, measures in interleaved rounds, ends the sides.

All sides stay started, and never more than one is under load. Knows neither commands nor reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from benchmarks.cases import Case, Load, LoadName, Measure, SideName, measures_of
from benchmarks.results import LoadResult, Outcome
from benchmarks.sides import Side, SideContext, open_side

__all__ = ["order_of_round", "run_cases", "run_rounds"]

_WARM_UP_TOKENS = 8
_WARM_UP_ROUND = 0

Progress = Callable[[str], None]


async def run_cases(
    cases: Sequence[Case],
    loads: Mapping[LoadName, Load],
    context: SideContext,
    rounds: int,
    side_seconds: float,
    progress: Progress,
) -> Outcome:
    """Measure all that `cases` need, `rounds` times.

    A measure stops early if one more round would bring it over `side_seconds` in all; a note says so.

    Raises: ProcessError if a side does not start or does not answer everything that it is asked.
    """
    measures = measures_of(cases)
    async with contextlib.AsyncExitStack() as stack:
        sides: dict[SideName, Side] = {}
        for name in dict.fromkeys(measure.side for measure in measures):
            progress(f"Starting {name} …")
            sides[name] = await stack.enter_async_context(open_side(name, context))
        results, notes = await run_rounds(measures, sides, loads, rounds, side_seconds, progress)
    return Outcome(tuple(cases), results, (*notes, *_remarks(results)))


async def run_rounds(
    measures: Sequence[Measure],
    sides: Mapping[SideName, Side],
    loads: Mapping[LoadName, Load],
    rounds: int,
    side_seconds: float,
    progress: Progress,
) -> tuple[dict[Measure, dict[int, LoadResult]], list[str]]:
    """Warm up, then measure; the results by measure and round, which count from 1, and notes."""
    for measure in measures:
        progress(f"Warming up {measure} …")
        await sides[measure.side].run(loads[measure.load].questions(_WARM_UP_ROUND, _WARM_UP_TOKENS))
    results: dict[Measure, dict[int, LoadResult]] = {measure: {} for measure in measures}
    notes: list[str] = []
    stopped: set[Measure] = set()
    for index in range(1, rounds + 1):
        for measure in order_of_round(measures, index):
            if measure in stopped:
                continue
            spent = [result.seconds for result in results[measure].values()]
            if spent and sum(spent) + spent[-1] > side_seconds:
                stopped.add(measure)
                notes.append(
                    f"{measure}: {len(spent)} of {rounds} rounds, to stay within {side_seconds:g} seconds."
                )
                continue
            progress(f"Round {index} of {rounds}: {measure} …")
            results[measure][index] = await sides[measure.side].run(loads[measure.load].questions(index))
    return results, notes


def order_of_round(measures: Sequence[Measure], index: int) -> list[Measure]:
    """Every second round runs backwards, so that a machine that slows down favours no side."""
    return list(measures) if index % 2 else list(reversed(measures))


def _remarks(results: Mapping[Measure, Mapping[int, LoadResult]]) -> list[str]:
    """Sentences about results that do not mean what they seem to."""
    remarks = []
    for measure, rounds in results.items():
        retries = sum(answer.retries for result in rounds.values() for answer in result.answers)
        if retries:
            remarks.append(f"{measure}: {retries} connections were refused or reset, and were tried again.")
        base = results.get(Measure(measure.side, LoadName.BASE), {})
        if measure.load is LoadName.MIXED and _answers(rounds) and _answers(rounds) <= _answers(base):
            remarks.append(f"{measure}: every answer is the base's: the adapters had no effect.")
    return remarks


def _answers(rounds: Mapping[int, LoadResult]) -> set[tuple[int, int, str]]:
    return {
        (index, place, answer.text)
        for index, result in rounds.items()
        for place, answer in enumerate(result.answers)
    }

"""Runs cases: starts the sides of a stage, prepares, measures in interleaved rounds, ends the sides.

Never more than one side is under load. Knows neither commands nor reports.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from adapters_core.errors import AdapterError
from benchmarks.case import Case, Measure, Sample, Samples
from benchmarks.processes import ProcessError
from benchmarks.sides import Side, SideContext, SideKind, SideSpec, open_side

__all__ = ["CaseOutcome", "Progress", "measures_of", "order_of_round", "run_cases", "run_rounds", "share_of"]

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CaseOutcome:
    """A case's samples, or the sentence that says why there are none."""

    case: Case
    samples: Samples = field(default_factory=dict)
    failure: str | None = None


async def run_cases(
    cases: Sequence[Case], context: SideContext, rounds: int, progress: Progress, until: float = math.inf
) -> list[CaseOutcome]:
    """Measure stage after stage, those with a peer last; the outcomes are in the order of the cases.

    A stage that fails leaves its cases without samples and the others as they are. What is left `until` then,
    on the clock of `time.perf_counter`, is shared between the stages, so that all have about as many rounds:
    a measure that would not end within its stage's share is not measured again.
    """
    stages: dict[str, list[Case]] = {}
    for case in cases:
        stages.setdefault(case.measured_with, []).append(case)
    # A peer takes the most time, and the last stage has what the others have left of theirs.
    stages = dict(sorted(stages.items(), key=lambda stage: _has_peer(stage[1])))
    outcomes: dict[str, CaseOutcome] = {}
    for number, (name, members) in enumerate(stages.items(), 1):

        def tell(text: str, head: str = f"[{number}/{len(stages)}] {name}: ") -> None:
            progress(head + text)

        left = [case for case in cases if case.name not in outcomes]
        share = share_of(members, left, rounds)
        now = time.perf_counter()
        try:
            samples = await _run_stage(members, context, rounds, tell, now + share * (until - now))
        except (AdapterError, ProcessError, OSError, ValueError) as error:
            tell(f"failed: {str(error).splitlines()[0]}")
            outcomes |= {case.name: CaseOutcome(case, failure=str(error)) for case in members}
            continue
        for case in members:
            own = {measure: samples[measure] for measure in case.measures}
            outcomes[case.name] = CaseOutcome(case, own)
    return [outcomes[case.name] for case in cases]


async def _run_stage(
    cases: Sequence[Case], context: SideContext, rounds: int, progress: Progress, until: float
) -> Samples:
    measures = measures_of(cases, rounds)
    async with contextlib.AsyncExitStack() as stack:
        sides: dict[SideSpec, Side] = {}
        for spec in dict.fromkeys(measure.side for measure in measures):
            progress(f"starting {spec}")
            sides[spec] = await stack.enter_async_context(open_side(spec, context))
        return await run_rounds(measures, sides, progress, until)


async def run_rounds(
    measures: Mapping[Measure, int],
    sides: Mapping[SideSpec, Side],
    progress: Progress,
    until: float = math.inf,
) -> Samples:
    """Prepare, then measure: the samples by measure and round, which count from 1.

    The first round is always whole; a later one leaves out what would not end before `until`.
    """
    for measure in measures:
        progress(f"preparing {measure.name}")
        await measure.prepare(sides[measure.side])
    samples: dict[Measure, dict[int, Sample]] = {measure: {} for measure in measures}
    took_seconds: dict[Measure, float] = {}
    last = max(measures.values())
    for index in range(1, last + 1):
        for measure in order_of_round([each for each, rounds in measures.items() if rounds >= index], index):
            start = time.perf_counter()
            if start + took_seconds.get(measure, -math.inf) > until:
                progress(f"no time for round {index} of {measures[measure]}, {measure.name}")
                continue
            progress(f"round {index} of {measures[measure]}, {measure.name}")
            samples[measure][index] = await measure.run(sides[measure.side], index)
            took_seconds[measure] = time.perf_counter() - start
    return samples


def share_of(cases: Sequence[Case], left: Sequence[Case], rounds: int) -> float:
    """Which part of the time that is left for the cases `left` is that of `cases`, which are among them."""
    return _seconds_of(cases, rounds) / _seconds_of(left, rounds)


def _seconds_of(cases: Sequence[Case], rounds: int) -> float:
    return sum(case.round_seconds * (rounds if case.rounds is None else case.rounds) for case in cases)


def _has_peer(cases: Sequence[Case]) -> bool:
    return any(measure.side.kind is SideKind.MLX_LM for case in cases for measure in case.measures)


def measures_of(cases: Sequence[Case], rounds: int) -> dict[Measure, int]:
    """All that the cases need, each once, in order, with the most rounds that a case asks for."""
    needed: dict[Measure, int] = {}
    for case in cases:
        for measure in case.measures:
            needed[measure] = max(needed.get(measure, 0), rounds if case.rounds is None else case.rounds)
    return needed


def order_of_round(measures: Sequence[Measure], index: int) -> list[Measure]:
    """Every second round runs backwards, so that a machine that slows down favours no side."""
    return list(measures) if index % 2 else list(reversed(measures))

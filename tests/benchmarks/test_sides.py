"""How sides begin and end, also badly."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Measure
from benchmarks.cases.fairness import Fairness
from benchmarks.cases.stalls import Stalls
from benchmarks.command import run_to_end
from benchmarks.library import AdapterLibrary, AdapterSet
from benchmarks.loads import LoadMeasure
from benchmarks.processes import ProcessError
from benchmarks.runner import run_cases
from benchmarks.sides import Question, SideContext, SideKind, SideSpec, open_side


def context_of(model_path: Path, folder: Path) -> SideContext:
    return SideContext(model_path, AdapterLibrary(model_path, folder / "adapters", 0), folder, 60, 60)


async def test_a_side_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    context = context_of(tmp_path / "no-model", tmp_path)
    async with open_side(SideSpec(SideKind.BARE), context) as side:
        with pytest.raises(ProcessError, match=r"(?s)BatchGenerator: .*exit code 1.*no-model"):
            await side.ask([Question("Be kind.", "Hello?", 3)])
        with pytest.raises(ProcessError, match="BatchGenerator has no /v1/adapters"):
            await side.adapters()


async def test_our_server_as_a_side(tiny_model_path: Path, tmp_path: Path) -> None:
    spec = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, 3),))
    measure = LoadMeasure(spec, 4, 3, adapters=2)
    async with open_side(spec, context_of(tiny_model_path, tmp_path)) as side:
        await measure.prepare(side)
        sample = await measure.run(side, 1)
        listed = await side.adapters()
        assert {adapter["id"] for adapter in listed["data"]} == {"rank8-qv-0", "rank8-qv-1"}
        assert (await side.load("rank8-qv-2"))["rank"] == 8
        assert (await side.activate("rank8-qv-2"))["active"] == "rank8-qv-2"
        await side.activate(None)
        await side.unload("rank8-qv-2")
        assert await side.metric("graft_completion_tokens_total") >= 12
        with pytest.raises(ProcessError, match="a metric graft_nothing"):
            await side.metric("graft_nothing")
        with pytest.raises(ProcessError, match="404"):
            await side.load("no-such-adapter")
        assert await side.process_bytes() > 10_000_000
        pid = side.child.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(sample.texts) == 4
    assert len(sample.values["first_token_seconds"]) == 4
    assert sample.values["completion_tokens"] == (12.0,)
    assert sample.values["cached_percent"][0] < 20


async def test_gaps_of_streams_before_and_while_adapters_load(tiny_model_path: Path, tmp_path: Path) -> None:
    spec = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, 5),))
    stalls = Stalls(spec, streams=2, tokens=600, loads=3)
    async with open_side(spec, context_of(tiny_model_path, tmp_path)) as side:
        await stalls.prepare(side)
        sample = await stalls.run(side, 1)
        listed = await side.adapters()
    assert {adapter["id"] for adapter in listed["data"]} == {"rank8-qv-0", "rank8-qv-1"}
    quiet, busy = sample.values["quiet_gap_seconds"], sample.values["busy_gap_seconds"]
    (acting_seconds,) = sample.values["acting_seconds"]
    assert len(quiet) + len(busy) < 2 * 600
    assert all(gap >= 0 for gap in (*quiet, *busy))
    assert acting_seconds > 0
    assert sum(busy) >= acting_seconds


async def test_streams_too_short_to_tell_are_an_error(tiny_model_path: Path, tmp_path: Path) -> None:
    spec = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, 2),))
    async with open_side(spec, context_of(tiny_model_path, tmp_path)) as side:
        with pytest.raises(ValueError, match="let them have more tokens"):
            await Stalls(spec, streams=1, tokens=2, loads=1).run(side, 1)


async def test_a_load_that_fails_fails_its_stage_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    spec = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, 2),))
    measures: list[Measure] = [Stalls(spec, streams=2, tokens=300, loads=2), LoadMeasure(spec, 1, 2)]
    cases = [Case(str(number), "", (each,), stage=str(number)) for number, each in enumerate(measures)]
    outcomes = await run_cases(cases, context_of(tiny_model_path, tmp_path), 1, lambda text: None)
    assert [bool(outcome.samples) for outcome in outcomes] == [False, True]
    assert "POST /v1/adapters was answered 404" in (outcomes[0].failure or "")


async def test_a_crowd_that_fails_is_an_error_of_its_side(tiny_model_path: Path, tmp_path: Path) -> None:
    spec = SideSpec(SideKind.GRAFT, (AdapterSet(RANK_8_QV, 2),))
    async with open_side(spec, context_of(tiny_model_path, tmp_path)) as side:
        (side.root / "rank8-qv-0").rename(tmp_path / "away")
        with pytest.raises(ProcessError, match="404"):
            await Fairness(spec, crowd=2, max_tokens=2).run(side, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_cancels_the_run_and_a_second_breaks_nothing_off(number: signal.Signals) -> None:
    ended: list[str] = []

    async def interrupted(name: str) -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def run() -> None:
        try:
            await interrupted("the work")
        finally:
            try:
                await interrupted("the first process")
            finally:
                ended.append("the second process")

    with pytest.raises(asyncio.CancelledError):
        run_to_end(run())
    assert ended == ["the work", "the first process", "the second process"]

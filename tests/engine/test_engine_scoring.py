"""Scoring through the engine with its real thread: taken whatever waits, left early, stopped."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.engine import Engine
from server.engine.errors import EngineOverloadedError, EngineStoppedError, InvalidSubmitError
from server.engine.messages import Event, Failed, Finished, Scored
from tests.engine.engines import WAIT_SECONDS, Ends, Gate, collect, make_engine, tokens
from tests.engine.scores import expected, scoring
from tests.engine.support import loaded, prompts, reference, submit
from tests.models import tiny_llama

PROMPT, SHORT, LONG = prompts([9, 5, 800], seed=51)  # the last takes more than one forward


def scored(events: list[Event]) -> list[list[float]]:
    """What was told of each answer, in the order of the answers; the request must have finished."""
    *told, end = events
    assert isinstance(end, Finished)
    by_answer = {event.answer: list(event.logprobs) for event in told if isinstance(event, Scored)}
    return [by_answer[answer] for answer in range(len(told))]


async def test_scores_come_beside_streams_and_the_end_is_told_once(engine: Engine) -> None:
    ends = Ends()
    stream = engine.generate(submit("stream", PROMPT, 20))
    job = engine.score(scoring("job", PROMPT, SHORT, LONG[:40]), ends)
    events, streamed = await asyncio.gather(collect(job), collect(stream))
    model = tiny_llama()
    for found, answer in zip(scored(events), (SHORT, LONG[:40]), strict=True):
        assert found == pytest.approx(expected(model, PROMPT, answer), abs=1e-4)
    assert tokens(streamed) == reference(model, PROMPT, 20)
    assert ends.count == 1
    assert engine.stats.scored_tokens == 45
    assert engine.stats.scoring_rows == 0


async def test_it_is_taken_when_the_queue_is_full_and_waits_with_it(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    taken = [engine.generate(submit(f"r{i}", [1, 2], 2)) for i in range(3)]
    with pytest.raises(EngineOverloadedError):
        engine.generate(submit("refused", [1, 2], 2))
    job = engine.score(scoring("job", PROMPT, SHORT))
    assert engine.waiting_requests == 3
    gate.open()
    for events in await asyncio.gather(*map(collect, taken)):
        assert len(tokens(events)) == 2
    assert len(scored(await collect(job))) == 1
    assert engine.waiting_requests == 0


async def test_what_makes_no_sense_never_reaches_the_thread(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    ends = Ends()
    running = engine.generate(submit("r", [1, 2], 2))
    for job, problem in [
        (scoring("job", PROMPT, []), "at least one token"),
        (scoring("job", PROMPT, [96]), "0 to 95"),
        (scoring("r", PROMPT, SHORT), "in use"),
    ]:
        with pytest.raises(InvalidSubmitError, match=problem):
            engine.score(job, ends)
    gate.open()
    assert len(tokens(await collect(running))) == 2
    assert ends.count == 0
    with pytest.raises(EngineStoppedError, match="not been started"):
        make_engine(lambda: loaded(tiny_llama())).score(scoring("job", PROMPT, SHORT))


async def test_leaving_early_ends_it(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    ends = Ends()
    job = engine.score(scoring("job", PROMPT, LONG), ends)
    await gate.reached()
    await job.aclose()
    gate.open()
    await ends.wait()
    assert ends.count == 1
    after = engine.score(scoring("after", PROMPT, SHORT))
    assert scored(await collect(after))[0] == pytest.approx(expected(tiny_llama(), PROMPT, SHORT), abs=1e-4)


async def test_a_stop_lets_it_finish_within_the_time(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    job = engine.score(scoring("job", PROMPT, LONG))
    await gate.reached()
    stop = asyncio.create_task(engine.stop(WAIT_SECONDS))
    await asyncio.sleep(0)
    with pytest.raises(EngineStoppedError, match="stopping"):
        engine.score(scoring("late", PROMPT, SHORT))
    gate.open()
    (found,) = scored(await collect(job))
    assert found == pytest.approx(expected(tiny_llama(), PROMPT, LONG), abs=1e-4)
    await stop
    assert not engine.alive


async def test_what_is_not_scored_in_time_fails_at_the_stop(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    ends = Ends()
    running, waiting = (engine.score(scoring(name, PROMPT, LONG), ends) for name in ("running", "waiting"))
    await gate.reached()
    stop = asyncio.create_task(engine.stop(0.0))
    await asyncio.sleep(0)
    gate.open()
    for job in (running, waiting):
        (event,) = await collect(job)
        assert isinstance(event, Failed)
        assert "stopped" in event.message
    await stop
    assert ends.count == 2

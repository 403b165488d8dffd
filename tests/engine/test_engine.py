"""The engine with its real thread: streams, leaving early, overload, updates, failures, stopping."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from server.engine.engine import Engine, Generation
from server.engine.errors import (
    EngineError,
    EngineOverloadedError,
    EngineStoppedError,
    InvalidSubmitError,
    ModelLoadError,
)
from server.engine.messages import ChoiceFinished, Failed, Finished, SamplingParams, Submit, Token
from server.engine.model import LoadedModel
from tests.engine.engines import (
    ENDLESS_TOKENS,
    WAIT_SECONDS,
    Ends,
    Gate,
    Gated,
    collect,
    make_engine,
    tokens,
)
from tests.engine.scores import scoring
from tests.engine.support import loaded, reference, submit
from tests.models import tiny_llama


async def test_requests_side_by_side_stream_their_tokens(engine: Engine) -> None:
    ends = [Ends() for _ in range(8)]
    prompts = [list(range(1, 3 + 4 * i)) for i in range(8)]
    generations = [engine.generate(submit(f"r{i}", prompt, 6), ends[i]) for i, prompt in enumerate(prompts)]
    for prompt, events in zip(prompts, await asyncio.gather(*map(collect, generations)), strict=True):
        assert tokens(events) == reference(tiny_llama(), prompt, 6)
        assert events[-2] == ChoiceFinished(0, "length", 6)
        assert isinstance(events[-1], Finished)
    assert [end.count for end in ends] == [1] * 8
    assert engine.waiting_requests == 0
    assert engine.stats.completion_tokens == 48
    assert engine.stats.running_rows == 0
    assert engine.stats.prompt_cache.entries > 0


async def test_what_a_started_engine_says_of_itself() -> None:
    engine = make_engine(lambda: loaded(tiny_llama()))
    assert (engine.alive, engine.ready, engine.draining) == (False, False, False)
    with pytest.raises(EngineStoppedError, match="not been started"):
        _ = engine.info
    with pytest.raises(EngineStoppedError, match="not been started"):
        engine.generate(submit("r", [1]))
    info = await engine.start()
    assert engine.info is info
    assert (info.model_id, info.context_tokens) == ("tiny", 4096)
    assert (engine.alive, engine.ready, engine.draining) == (True, True, False)
    assert engine.beat_age_seconds < WAIT_SECONDS
    with pytest.raises(EngineError, match="once"):
        await engine.start()
    await engine.stop(1.0)
    assert (engine.alive, engine.ready, engine.draining) == (False, False, False)


async def test_the_thread_beats_when_there_is_nothing_to_do(engine: Engine) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        for _ in range(2):
            before = engine.beat_age_seconds
            while engine.beat_age_seconds >= before:
                before = engine.beat_age_seconds
                await asyncio.sleep(0.01)
    assert engine.alive


# Leaving


@pytest.mark.parametrize("how", ["aclose", "with", "drop", "task"])
async def test_leaving_early_cancels_and_the_end_is_told_once(engine: Engine, how: str) -> None:
    ends = Ends()
    generation = engine.generate(submit("r", [1, 2, 3], ENDLESS_TOKENS), ends)
    assert isinstance(await anext(generation), Token)
    if how == "aclose":
        await generation.aclose()
        await generation.aclose()
        assert [event async for event in generation] == []
    elif how == "with":
        with pytest.raises(KeyError):
            async with generation:
                raise KeyError
    elif how == "drop":
        del generation
    else:
        task = asyncio.create_task(read_all(generation))
        del generation
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
    gc.collect()
    await ends.wait()
    assert ends.count == 1
    assert engine.stats.completion_tokens < ENDLESS_TOKENS
    assert engine.stats.running_rows == 0
    again = await collect(engine.generate(submit("r", [1, 2, 3], 4)))
    assert tokens(again) == reference(tiny_llama(), [1, 2, 3], 4)


async def read_all(generation: Generation) -> None:
    async for _ in generation:
        pass


async def test_the_end_of_a_request_that_was_left_waits_for_the_thread(
    gated: tuple[Engine, Gate],
) -> None:
    engine, gate = gated
    running, waiting = Ends(), Ends()
    first = engine.generate(submit("running", [1, 2, 3], 5), running)
    second = engine.generate(submit("waiting", [4, 5], 5), waiting)
    await gate.reached()
    await first.aclose()
    await second.aclose()
    await asyncio.sleep(0)
    assert (running.count, waiting.count) == (0, 0)
    gate.open()
    await running.wait()
    await waiting.wait()
    assert (running.count, waiting.count) == (1, 1)


async def test_a_finished_request_is_not_cancelled_by_closing_it(engine: Engine) -> None:
    ends = Ends()
    generation = engine.generate(submit("r", [1, 2], 3), ends)
    await collect(generation)
    generation.cancel_choice(0)
    await generation.aclose()
    successor = engine.generate(submit("r", [1, 2], 5))
    assert len(tokens(await collect(successor))) == 5
    assert ends.count == 1


async def test_one_choice_can_be_stopped() -> None:
    gate = Gate()
    engine = make_engine(lambda: loaded(Gated(tiny_llama(), gate)), max_batch_size=2)
    await engine.start()
    generation = engine.generate(submit("r", [1, 2, 3], 40, choices=2))
    begins = asyncio.create_task(anext(generation))
    while not begins.done():
        gate.let_one()
        await asyncio.sleep(0.02)
    generation.cancel_choice(0)
    gate.open()
    events = [await begins, *await collect(generation)]
    ends = {event.choice: event for event in events if isinstance(event, ChoiceFinished)}
    assert ends[0].reason == "stop"
    assert ends[0].completion_tokens < 40
    assert ends[1] == ChoiceFinished(1, "length", 40)
    await engine.stop(0.0)


async def test_an_end_that_cannot_be_told_harms_nobody_else(engine: Engine) -> None:
    def fail() -> None:
        raise ValueError("mine")

    first = engine.generate(submit("first", [1, 2], 3), fail)
    second = engine.generate(submit("second", [1, 2], 3))
    for events in await asyncio.gather(collect(first), collect(second)):
        assert isinstance(events[-1], Finished)


# Refusing


async def test_too_many_waiting_requests_are_refused_until_there_is_room(
    gated: tuple[Engine, Gate],
) -> None:
    engine, gate = gated
    taken = [engine.generate(submit(f"r{i}", [1, 2], 2)) for i in range(3)]
    assert engine.waiting_requests == 2
    with pytest.raises(EngineOverloadedError, match="2 requests are waiting and at most 2 may"):
        engine.generate(submit("refused", [1, 2], 2))
    gate.open()
    await asyncio.gather(*map(collect, taken))
    assert len(tokens(await collect(engine.generate(submit("refused", [1, 2], 2))))) == 2


async def test_what_fits_into_the_batch_is_never_refused() -> None:
    engine = make_engine(lambda: loaded(tiny_llama()), max_batch_size=8, max_waiting=0)
    await engine.start()
    taken = [engine.generate(submit(f"r{i}", [1, 2], 2, choices=2)) for i in range(4)]
    assert engine.waiting_requests == 0
    with pytest.raises(EngineOverloadedError):
        engine.generate(submit("refused", [1, 2], 2))
    assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(*map(collect, taken)))
    await engine.stop(0.0)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [1, 96]}, "0 to 95"),
        ({"prompt": [-1]}, "0 to 95"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"choices": 0}, "choices"),
        ({"sampling": SamplingParams(logit_bias=((96, 1.0),))}, "logit_bias"),
        ({"sampling": SamplingParams(logit_bias=((1, float("inf")),))}, "bias"),
        ({"sampling": SamplingParams(temperature=-1.0)}, "temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "finite"),
        ({"sampling": SamplingParams(min_p=1.5)}, "min_p"),
        ({"sampling": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty"),
        ({"sampling": SamplingParams(top_logprobs=-1)}, "top_logprobs"),
    ],
)
async def test_requests_that_make_no_sense_never_reach_the_thread(
    engine: Engine, fields: dict[str, Any], problem: str
) -> None:
    ends = Ends()
    with pytest.raises(InvalidSubmitError, match=problem):
        engine.generate(submit("r", **{"prompt": [1], **fields}), ends)
    assert engine.waiting_requests == 0
    assert ends.count == 0


async def test_an_id_in_use_is_refused(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    generation = engine.generate(submit("r", [1]))
    with pytest.raises(InvalidSubmitError, match="in use"):
        engine.generate(submit("r", [1]))
    gate.open()
    assert isinstance((await collect(generation))[-1], Finished)


# Updates


async def test_updates_run_on_the_thread_one_after_the_other(engine: Engine) -> None:
    order: list[int] = []

    def note(number: int) -> Callable[[Any], str]:
        return lambda context: order.append(number) or threading.current_thread().name

    generation = engine.generate(submit("r", [1, 2, 3], 30))
    names = await asyncio.gather(*(engine.container.update(note(i), drain=i == 2) for i in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert set(names) == {"generation"}
    assert await engine.container.perform(lambda context: context.digest) == "sha256:tiny"
    assert tokens(await collect(generation)) == reference(tiny_llama(), [1, 2, 3], 30)


async def test_an_updates_error_is_raised_to_its_caller_alone(engine: Engine) -> None:
    def fail(context: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await engine.container.update(fail)
    with pytest.raises(ValueError, match="mine"):
        await engine.container.perform(fail)
    assert len(tokens(await collect(engine.generate(submit("r", [1, 2], 3))))) == 3


async def test_a_cancelled_update_still_runs_and_the_next_one_is_not_held_up(
    gated: tuple[Engine, Gate],
) -> None:
    engine, gate = gated
    ran: list[str] = []
    generation = engine.generate(submit("r", [1, 2, 3], 3))
    await gate.reached()
    cancelled = asyncio.create_task(
        engine.container.update(lambda context: ran.append("cancelled"), drain=True)
    )
    await asyncio.sleep(0)  # it has handed its function over now
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    following = asyncio.create_task(engine.container.update(lambda context: ran.append("following")))
    gate.open()
    async with asyncio.timeout(WAIT_SECONDS):
        await following
    assert ran == ["cancelled", "following"]
    assert len(tokens(await collect(generation))) == 3


# Starting and stopping


async def test_a_failure_to_load_is_raised_by_start() -> None:
    def fail() -> LoadedModel:
        raise ModelLoadError("there is no such model")

    engine = make_engine(fail)
    with pytest.raises(ModelLoadError, match="no such model"):
        await engine.start()
    await engine.stop(1.0)
    assert not engine.alive
    with pytest.raises(EngineStoppedError):
        engine.generate(submit("r", [1]))
    with pytest.raises(EngineStoppedError):
        await engine.container.perform(lambda context: None)


async def test_cancelling_the_start_ends_the_thread_after_the_load() -> None:
    gate = threading.Event()

    def load() -> LoadedModel:
        gate.wait(WAIT_SECONDS)
        return loaded(tiny_llama())

    engine = make_engine(load)
    start = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert engine.draining
    gate.set()
    await engine.stop(1.0)
    assert not engine.alive


async def test_stopping_lets_requests_finish_and_takes_no_more(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    generations = [engine.generate(submit(f"r{i}", [1, 2, 3], 4)) for i in range(2)]
    stop = asyncio.create_task(engine.stop(WAIT_SECONDS))
    await asyncio.sleep(0)
    assert (engine.draining, engine.ready) == (True, False)
    with pytest.raises(EngineStoppedError, match="stopping"):
        engine.generate(submit("late", [1]))
    with pytest.raises(EngineStoppedError, match="stopping"):
        await engine.container.update(lambda context: None)
    gate.open()
    for generation in generations:
        assert tokens(await collect(generation)) == reference(tiny_llama(), [1, 2, 3], 4)
    async with asyncio.timeout(WAIT_SECONDS):
        await stop
    assert not engine.alive


async def test_what_does_not_finish_in_time_fails_at_the_stop(engine: Engine) -> None:
    ends = Ends()
    generation = engine.generate(submit("r", [1, 2, 3], ENDLESS_TOKENS), ends)
    assert isinstance(await anext(generation), Token)
    drain = asyncio.create_task(engine.container.update(lambda context: None, drain=True))
    await asyncio.sleep(0)
    await engine.stop(0.0)
    events = await collect(generation)
    assert isinstance(events[-1], Failed)
    assert "stopped" in events[-1].message
    assert ends.count == 1
    with pytest.raises(EngineStoppedError):
        await drain
    await engine.stop(0.0)


async def test_a_thread_that_does_not_stop_is_left_behind_and_what_it_says_later_is_not_heard() -> None:
    gate, ends = Gate(), [Ends() for _ in range(3)]
    engine = make_engine(lambda: loaded(Gated(tiny_llama(), gate)), max_batch_size=1, grace_seconds=0.05)
    await engine.start()
    generations = [engine.generate(submit(f"r{i}", [1, 2, 3], 5), ends[i]) for i in range(2)]
    generations.append(engine.score(scoring("scored", [1, 2, 3], [4, 5]), ends[2]))
    await gate.reached()
    update = asyncio.create_task(engine.container.update(lambda context: None, drain=True))
    await asyncio.sleep(0)
    await engine.stop(0.0)
    assert not engine.alive
    for generation in generations:
        (event,) = await collect(generation)
        assert isinstance(event, Failed)
        assert "stopped" in event.message
    with pytest.raises(EngineStoppedError):
        engine.generate(submit("late", [1]))
    gate.open()
    with pytest.raises(EngineStoppedError):
        await update
    await engine.stop(0.0)
    assert [end.count for end in ends] == [1, 1, 1]
    assert engine.stats.running_rows == 0


async def test_a_thread_that_dies_fails_what_it_had_and_is_not_alive() -> None:
    class Fatal(BaseException):
        """Nothing that a step recovers from."""

    class Deadly(Gated):
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            if inputs.size == 1:
                raise Fatal
            return self.model(inputs, cache=cache)

    engine = make_engine(lambda: loaded(Deadly(tiny_llama(), Gate())))
    await engine.start()
    ends = Ends()
    events = await collect(engine.generate(submit("r", [1, 2, 3], 5), ends))
    await engine.stop(1.0)
    assert isinstance(events[-1], Failed)
    assert ends.count == 1
    assert not engine.alive
    with pytest.raises(EngineStoppedError):
        engine.generate(Submit("late", (), (1,), 1, frozenset()))


ONE_LIFE = """
from server.blas import load_openblas
load_openblas()
import asyncio
from server.engine.engine import Engine
from server.engine.loop import LoopOptions
from tests.engine.support import loaded, submit
from tests.models import tiny_llama

async def main():
    engine = Engine(lambda: loaded(tiny_llama()), LoopOptions(), prompt_cache_bytes=1 << 20, max_waiting=1)
    await engine.start()
    async for event in engine.generate(submit("r", [1, 2, 3], 4)):
        pass
    await engine.stop(1.0)
    print(event)

asyncio.run(main())
"""


def test_a_process_ends_cleanly_right_after_its_engine() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ONE_LIFE], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Finished(cached_tokens=0)\n"

"""Scheduling through the loop: decoding goes on beside reading, adapters take turns, prefixes are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import RowAdapters
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.messages import Cancel, Finished, Token
from tests.engine.support import CountingModel, Transcript, make_context, prompts, reference, run, submit
from tests.models import make_adapter, tiny_llama


class Clock:
    """Seconds that pass only in forwards: a hundredth for each token, and `forward` for each."""

    def __init__(self, forward: float) -> None:
        self.read: list[int] = []
        self._forward = forward

    def __call__(self) -> float:
        return self._forward * len(self.read) + sum(self.read) / 100


def timed_loop(
    model: nn.Module, forward_seconds: float = 0.01, **options: Any
) -> tuple[GenerationLoop, Clock]:
    clock = Clock(forward_seconds)
    context = make_context(CountingModel(model, clock.read))
    return GenerationLoop(context, LoopOptions(**options), clock), clock


def test_running_streams_go_on_while_long_prompts_are_read() -> None:
    model = tiny_llama()
    loop, clock = timed_loop(model, max_batch_size=8)
    first, *long = prompts([3, 700, 900, 800, 650], seed=1)
    loop.submit(submit("first", first, 200))
    transcript = Transcript()
    for _ in range(8):
        transcript.add(loop.step())
    for number, prompt in enumerate(long):
        loop.submit(submit(f"long{number}", prompt, 4))
    gaps: list[float] = []
    while not loop.idle:
        before = clock()
        events = loop.step()
        transcript.add(events)
        if any(isinstance(event, Token) and name == "first" for name, event in events):
            gaps.append(clock() - before)
    # 3,050 tokens take 30 s, a decoding step 0.02 s, and a read of the least size, 32 tokens, 0.33 s: more of
    # them only where that finishes prompts.
    assert max(gaps) < 2
    assert sum(gap > 0.2 for gap in gaps) >= 20
    for number, prompt in enumerate(long):
        assert transcript.tokens(f"long{number}") == reference(model, prompt, 4)
    assert transcript.tokens("first") == reference(model, first, 200)


def test_a_long_prompt_holds_up_many_streams_by_about_four_steps_time() -> None:
    model = tiny_llama()
    loop, clock = timed_loop(model, max_batch_size=16)
    for number, prompt in enumerate(prompts([5] * 12, seed=2)):
        loop.submit(submit(f"r{number}", prompt, 60))
    for _ in range(10):
        loop.step()
    decode = -clock()
    loop.step()
    decode += clock()
    (long,) = prompts([1500], seed=3)
    loop.submit(submit("long", long, 2))
    worst = 0.0
    while not loop.idle:
        before = clock()
        loop.step()
        if loop.stats.running_rows == 13:
            worst = max(worst, clock() - before)
    assert 3 * decode < worst <= 7 * decode


def test_short_prompts_that_come_together_are_read_in_few_steps() -> None:
    model = tiny_llama()
    loop, clock = timed_loop(model, 1.0, max_batch_size=16)
    run(loop, *(submit(f"w{number}", [number], 9) for number in range(9)), submit("w", list(range(60)), 9))
    run(loop, submit("another size", list(range(400)), 2))
    clock.read.clear()
    requests = {f"r{number}": prompt for number, prompt in enumerate(prompts([45] * 16, seed=4))}
    transcript = run(loop, *(submit(name, prompt, 24) for name, prompt in requests.items()))
    # Two cohorts of eight, each read whole: two forwards to read and to begin, then 25 steps of decoding.
    assert len(clock.read) <= 29
    for name, prompt in requests.items():
        assert transcript.tokens(name) == reference(model, prompt, 24)


def rows_of(loop: GenerationLoop, folder: Path, names: str) -> dict[str, RowAdapters]:
    bank = loop._context.bank  # pyright: ignore[reportPrivateUsage] (the tests are on its thread)
    rows: dict[str, RowAdapters] = {}
    for seed, name in enumerate(names):
        path = make_adapter(folder / name, tiny_llama(), "lora", seed=seed, rank=2)
        rows[name] = ((bank.add(AdapterContainer.from_directory(path)), 1.0),)
    return rows


def test_a_popular_adapter_does_not_hold_up_the_others(tmp_path: Path) -> None:
    loop = GenerationLoop(make_context(tiny_llama()), LoopOptions(max_batch_size=4))
    rows = rows_of(loop, tmp_path, "ab")
    for number, prompt in enumerate(prompts([6] * 60, seed=5)):
        loop.submit(submit(f"a{number}", prompt, 5, row=rows["a"]))
    transcript, order = Transcript(), dict[str, None]()

    def step() -> None:
        events = loop.step()
        transcript.add(events)
        order.update(dict.fromkeys(name for name, _ in events))

    step()
    loop.submit(submit("b", [1, 2, 3], 5, row=rows["b"]))
    loop.submit(submit("base", [1, 2, 3], 5))
    while not loop.idle:
        step()
    assert list(order).index("b") < 4 + 4
    assert list(order).index("base") < 4 + 4
    assert list(order)[:4] == ["a0", "a1", "a2", "a3"]
    assert transcript.tokens("base") == reference(tiny_llama(), [1, 2, 3], 5)


def test_no_more_adapters_than_allowed_decode_together(tmp_path: Path) -> None:
    loop = GenerationLoop(make_context(tiny_llama()), LoopOptions(max_batch_size=8, max_batch_adapters=2))
    rows = rows_of(loop, tmp_path, "abc")
    for number in range(12):
        name = "abc"[number % 3]
        loop.submit(submit(f"{name}{number}", [1, 2, number], 4, row=rows[name]))
    transcript, seen = Transcript(), set[int]()
    while not loop.idle:
        transcript.add(loop.step())
        seen.add(loop.stats.batch_adapters)
    assert max(seen) == 2
    assert all(isinstance(transcript.end(f"{'abc'[n % 3]}{n}"), Finished) for n in range(12))


def test_a_prompt_serves_others_as_soon_as_it_has_been_read() -> None:
    model = tiny_llama()
    loop, clock = timed_loop(model, max_batch_size=4, keep_prompt_tokens=32)
    prefix, one, two = prompts([60, 5, 7], seed=6)
    transcript = Transcript()
    loop.submit(submit("one", [*prefix, *one], 40))
    for _ in range(4):
        transcript.add(loop.step())
    assert not transcript.ended("one")
    read = sum(clock.read)
    loop.submit(submit("two", [*prefix, *two], 2))
    while not transcript.ended("two"):
        transcript.add(loop.step())
    assert not transcript.ended("one")
    assert transcript.end("two") == Finished(60)
    assert sum(clock.read) - read < 7 + 2 * 10
    run(loop, transcript=transcript)
    assert transcript.tokens("two") == reference(model, [*prefix, *two], 2)
    assert transcript.tokens("one") == reference(model, [*prefix, *one], 40)


def test_short_prompts_are_kept_at_the_end_alone() -> None:
    loop, _ = timed_loop(tiny_llama(), keep_prompt_tokens=32)
    transcript = Transcript()
    loop.submit(submit("r", prompts([30])[0], 20))
    for _ in range(5):
        transcript.add(loop.step())
    assert loop.stats.prompt_cache.entries == 0
    run(loop, transcript=transcript)
    assert loop.stats.prompt_cache.entries == 1


@pytest.mark.parametrize("waiting", [1, 5])
def test_requests_that_share_a_long_beginning_read_it_once(waiting: int) -> None:
    model = tiny_llama()
    loop, clock = timed_loop(model, max_batch_size=8, prefill_step_tokens=16, keep_prompt_tokens=32)
    prefix, *tails = prompts([100, 90, *[6] * waiting], seed=7)
    requests = {f"r{number}": [*prefix, *tail] for number, tail in enumerate(tails)}
    transcript = run(loop, *(submit(name, prompt, 3) for name, prompt in requests.items()))
    for name, prompt in requests.items():
        assert transcript.tokens(name) == reference(model, prompt, 3)
        assert transcript.end(name) == Finished(0 if name == "r0" else 100)
    # The others start while the first one still reads on; some padding is read beside it.
    assert sum(clock.read) < 100 + 90 + waiting * (16 + 3) + 60


def test_nobody_waits_for_caches_that_are_not_kept() -> None:
    model = tiny_llama()
    context = make_context(model, prompt_cache_bytes=0)
    loop = GenerationLoop(context, LoopOptions(prefill_step_tokens=16, keep_prompt_tokens=32))
    (prefix,) = prompts([100], seed=8)
    loop.submit(submit("one", [*prefix, 1, 2], 3))
    loop.submit(submit("two", [*prefix, 3, 4], 3))
    transcript = Transcript()
    transcript.add(loop.step())
    assert loop.stats.running_requests == 2
    run(loop, transcript=transcript)
    assert transcript.tokens("two") == reference(model, [*prefix, 3, 4], 3)


def test_a_request_whose_forerunner_leaves_reads_for_itself() -> None:
    model = tiny_llama()
    loop, _ = timed_loop(model, max_batch_size=8, prefill_step_tokens=16, keep_prompt_tokens=32)
    (prefix,) = prompts([100], seed=8)
    loop.submit(submit("gone", [*prefix, 1, 2], 3))
    loop.submit(submit("follows", [*prefix, 3, 4], 3))
    transcript = Transcript()
    transcript.add(loop.step())
    loop.cancel(Cancel("gone"))
    run(loop, transcript=transcript)
    assert transcript.tokens("follows") == reference(model, [*prefix, 3, 4], 3)
    assert transcript.end("follows") == Finished(16)

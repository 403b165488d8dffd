"""A model that has just come computes a little before its first request, and nothing of it is seen later."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from server.engine.loop import LoopStats
from server.engine.pacing import Pace
from server.engine.warming import warm
from tests.engine.support import make_context, make_loop, reference, run, submit
from tests.models import tiny_llama

PROMPT = [5, 6, 7, 8, 9]


def test_a_warm_model_has_told_its_pace_and_answers_as_before() -> None:
    model = tiny_llama()
    loop = make_loop(model)
    loop.warm(4096)
    assert loop.idle
    assert loop.stats == LoopStats(prompt_cache=loop.stats.prompt_cache)
    assert loop.stats.prompt_cache.entries == 0
    assert run(loop, submit("r", PROMPT)).tokens("r") == reference(model, PROMPT, 8)


@pytest.mark.parametrize(
    ("context_tokens", "most_tokens", "seconds", "sizes"),
    [
        (4096, None, 0.001, [(1, 8), (8, 8), (8, 64), (8, 512)]),
        (256, None, 0.001, [(1, 8), (8, 8), (8, 64)]),
        (4096, 64, 0.001, [(1, 8), (8, 8)]),
        (4096, 1, 0.001, []),
        (4096, None, 1.0, [(1, 8)]),
    ],
)
def test_loads_grow_while_they_are_short_and_fit(
    context_tokens: int, most_tokens: int | None, seconds: float, sizes: list[tuple[int, int]]
) -> None:
    seen: list[tuple[int, int]] = []

    class Heard(Pace):
        def observe(self, seconds: float, *, decoded_rows: int, read_tokens: int, **_: object) -> None:
            seen.append((decoded_rows, read_tokens))

    ticks = iter(range(10_000))
    warm(
        make_context(tiny_llama()),
        Heard(min_tokens=1, max_tokens=1),
        lambda: seconds * next(ticks),
        context_tokens=context_tokens,
        most_tokens=most_tokens,
    )
    assert seen == [one for rows, tokens in sizes for one in ((rows, 0), (0, rows * tokens))]


def test_a_model_that_cannot_be_warmed_is_served_all_the_same() -> None:
    model = tiny_llama()
    loop = make_loop(model)
    forward, broken = type(model).__call__, [True]

    class Breaks(type(model)):
        def __call__(self, inputs: mx.array, *args: Any, **named: Any) -> mx.array:
            if broken[0]:
                raise RuntimeError("no memory")
            return forward(self, inputs, *args, **named)

    model.__class__ = Breaks
    loop.warm(4096)
    broken[0] = False
    assert run(loop, submit("r", PROMPT)).tokens("r") == reference(model, PROMPT, 8)

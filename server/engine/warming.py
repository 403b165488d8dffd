"""A first load for a model that has just come: what it needs is compiled, and what it costs is known.

Called on the generation thread before requests are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from .context import ModelContext
from .pacing import Pace

__all__ = ["warm"]

# Rows and tokens of their prompts. Each load reads several times what the one before it reads, and is left
# out where that took long.
_LOADS = ((1, 8), (8, 8), (8, 64), (8, 512))
_LONG_SECONDS = 0.05
_DECODED_TOKENS = 8


def warm(
    context: ModelContext,
    pace: Pace,
    clock: Callable[[], float],
    *,
    context_tokens: int,
    most_tokens: int | None,
) -> None:
    """Let the model read and decode batches of a few sizes, twice each, and tell `pace` the second times.

    A row may have `context_tokens`, and of all rows `most_tokens` may be read at once (None: any). Nothing of
    what is computed is kept.
    """
    for rows, tokens in _LOADS:
        most = rows * tokens if most_tokens is None else most_tokens
        if tokens + _DECODED_TOKENS > context_tokens or rows * tokens > most:
            break
        _load(context, rows, tokens, clock)  # compiles
        reading, decoding = _load(context, rows, tokens, clock)
        pace.observe(decoding, decoded_rows=rows, read_tokens=0)
        pace.observe(reading, decoded_rows=0, read_tokens=rows * tokens)
        if reading > _LONG_SECONDS:
            break
    mx.clear_cache()


def _load(context: ModelContext, rows: int, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of reading the prompts of a batch, until its rows decode, and of one step of decoding."""
    routed = context.routed
    generator = BatchGenerator(
        routed,  # pyright: ignore[reportArgumentType] (it calls the model, nothing else)
        completion_batch_size=rows,
        prefill_batch_size=rows,
        prefill_step_size=tokens,
        stream=mx.default_stream(mx.default_device()),
    )
    try:
        generator.insert_segments(
            segments=[[[0] * tokens, [0]] for _ in range(rows)],
            max_tokens=[_DECODED_TOKENS] * rows,
            caches=[routed.new_cache(()) for _ in range(rows)],
        )
        began = clock()
        generator.next()
        generator.next()
        reading = clock() - began
        generator.next()
        began = clock()
        generator.next()
        return reading, clock() - began
    finally:
        generator.close()

"""From sampling parameters to what mlx-lm's batch generator asks for: a sampler and processors for each row.

Knows nothing of requests, choices' text or the batch. Runs on the generation thread.

Order for each row, as in mlx-lm: logit bias, repetition, presence and frequency penalties, log-softmax (these
are the log-probabilities that a request can ask for), top-p, min-p, top-k, temperature, draw.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_top_k, apply_top_p, greedy_sampler, make_logits_processors

from .messages import SamplingParams

__all__ = ["LogitsProcessor", "RowSampler", "draw_seed", "make_processors", "make_sampler", "read_logprobs"]

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
RowSampler = Callable[[mx.array], mx.array]

# Below this a temperature only overflows; the draw is the most likely token anyway.
_SMALLEST_TEMPERATURE = 1e-5
# Below this only the most likely token is left, whose share is at least one of all tokens.
_SMALLEST_TOP_P = 1e-7
# More than any row is long, so that the penalties look back over all of it.
_WHOLE_ROW_TOKENS = 1 << 30


def draw_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(64)


def make_sampler(params: SamplingParams, seed: int, choice: int) -> RowSampler:
    """The sampler of one row: log-probabilities (1, V) → token (1,).

    All greedy rows get one and the same object, which lets the batch generator sample them in one call.
    """
    if params.temperature < _SMALLEST_TEMPERATURE or params.top_p <= _SMALLEST_TOP_P:
        return greedy_sampler
    return _SeededSampler(params, seed, choice)


class _SeededSampler:
    """Draws that depend on the seed, the choice and the step alone, not on what else is in the batch.

    Called once for each token of its row, so that the number of calls is the step.
    """

    def __init__(self, params: SamplingParams, seed: int, choice: int) -> None:
        self._inverse_temperature = 1.0 / params.temperature
        # As an array: mlx-lm's filter is compiled, and compiles anew for every new Python number.
        self._top_p = mx.array(params.top_p) if params.top_p < 1.0 else None
        self._log_min_p = math.log(params.min_p) if params.min_p > 0.0 else None
        self._top_k = params.top_k
        self._seed = seed
        self._choice = choice
        self._step = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        key = mx.random.key(_mix(self._seed, self._choice, self._step))
        self._step += 1
        logprobs = logprobs.astype(mx.float32)
        if self._top_p is not None:
            logprobs = apply_top_p(logprobs, self._top_p)  # pyright: ignore[reportArgumentType]
        if self._log_min_p is not None:
            floor = mx.max(logprobs, axis=-1, keepdims=True) + self._log_min_p
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        if 0 < self._top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * self._inverse_temperature, key=key)


def _mix(seed: int, choice: int, step: int) -> int:
    """A 64-bit key; near inputs give unrelated keys, which summing them would not."""
    data = struct.pack("<QQQ", seed % 2**64, choice, step)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def make_processors(params: SamplingParams, prompt_tokens: int) -> list[LogitsProcessor]:
    """The logits processors of one row: (row's tokens (T,), logits (1, V)) → logits (1, V).

    As in vLLM, the repetition penalty (arXiv:1909.05858) looks back over prompt and completion; presence and
    frequency penalties over the completion alone, that is past the first `prompt_tokens` tokens. Presence
    counts a token once, frequency every time.
    """
    repetition = params.repetition_penalty
    on_all = make_logits_processors(
        logit_bias=dict(params.logit_bias),
        repetition_penalty=None if repetition == 1.0 else repetition,
        repetition_context_size=_WHOLE_ROW_TOKENS,
    )
    on_completion = make_logits_processors(
        presence_penalty=params.presence_penalty,
        presence_context_size=_WHOLE_ROW_TOKENS,
        frequency_penalty=params.frequency_penalty,
        frequency_context_size=_WHOLE_ROW_TOKENS,
    )
    processors = [*on_all, *(_past(prompt_tokens, processor) for processor in on_completion)]
    return [_in_float32(processors)] if processors else []


def _in_float32(processors: Sequence[LogitsProcessor]) -> LogitsProcessor:
    """All of `processors` in turn, in whose range float16 need not have room; what is too large is cut."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        found = logits.astype(mx.float32)
        for processor in processors:
            found = processor(tokens, found)
        return mx.minimum(found, mx.finfo(logits.dtype).max).astype(logits.dtype)

    return process


def _past(prompt_tokens: int, processor: LogitsProcessor) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(tokens[prompt_tokens:], logits)

    return process


def read_logprobs(
    wanted: Sequence[tuple[mx.array, int, int]],
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each (log-probabilities (V,), chosen token, k): the chosen one's, and the k best, best first.

    Evaluates once for all.
    """
    lazy = [_lazy_top(logprobs, token, k) for logprobs, token, k in wanted]
    mx.eval(lazy)
    read = []
    for chosen, tokens, values in lazy:
        pairs = zip(np.array(tokens).tolist(), np.array(values).tolist(), strict=True)
        read.append((chosen.item(), tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))))
    return read


def _lazy_top(logprobs: mx.array, token: int, k: int) -> tuple[mx.array, mx.array, mx.array]:
    k = min(k, logprobs.shape[-1])
    logprobs = logprobs.astype(mx.float32)
    # Whoever asks for no alternatives is spared looking through the whole vocabulary.
    top = mx.argpartition(-logprobs, kth=k - 1)[:k] if k else mx.zeros(0, dtype=mx.uint32)
    return logprobs[token], top, logprobs[top]

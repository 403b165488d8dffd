"""Layers that reuse another layer's keys: rows of unlike lengths in a batch, against each row alone."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from server.engine.positions import keep_positions
from tests.mixed.architectures import tiny
from tests.models import relative_error, tiny_llama, tokens

AFM = "afm7, split query, key and value"


def in_a_batch(model: Any, rows: list[mx.array], steps: mx.array) -> list[np.ndarray]:
    """Each row's logits (L + steps, vocabulary), read together, shorter rows padded on the left."""
    longest = max(row.size for row in rows)
    padding = [longest - row.size for row in rows]
    caches = zip(*(make_prompt_cache(model) for _ in rows), strict=True)
    merged: list[Any] = [entries[0].merge(list(entries)) for entries in caches]
    for cache in merged:
        cache.prepare(left_padding=padding)
    inputs = mx.stack([mx.pad(row, (missing, 0)) for row, missing in zip(rows, padding, strict=True)])
    found = [model(inputs, cache=merged)]
    found += [model(steps[:, at : at + 1], cache=merged) for at in range(steps.shape[1])]
    logits = np.array(mx.concatenate(found, axis=1))
    return [logits[row, missing:] for row, missing in enumerate(padding)]


def test_rows_of_unlike_lengths_get_the_answers_that_they_get_alone() -> None:
    rows, steps = [tokens(length, seed=length) for length in (9, 4, 1)], tokens(3, 2)
    ours, theirs = tiny(AFM), tiny(AFM)
    keep_positions(ours)
    for row, logits in enumerate(in_a_batch(ours, rows, steps)):
        whole = mx.concatenate([rows[row], steps[row]])[None]
        expected = np.array(theirs(whole, cache=make_prompt_cache(theirs)))[0]
        assert relative_error(logits, expected) < 1e-5
        assert relative_error(np.array(ours(whole))[0], expected) < 1e-6
    # What it is for; when mlx-lm gets this right, it can go.
    alone = np.array(theirs(mx.concatenate([rows[1], steps[1]])[None]))[0]
    assert relative_error(in_a_batch(theirs, rows, steps)[1], alone) > 1e-2


def test_a_forward_on_another_thread_does_not_disturb() -> None:
    model, x = tiny(AFM), tokens(1, 4, 3, 16).astype(mx.float32)
    reusing = model.model.kv_reuse_layers[0].self_attn
    plain = reusing.rope
    keep_positions(model)
    rope = model.model.layers[-1].self_attn.rope
    rope(x, offset=5)
    elsewhere = threading.Thread(target=lambda: rope(x, offset=2))
    elsewhere.start()
    elsewhere.join()
    assert mx.array_equal(reusing.rope(x, offset=9), plain(x, offset=5)).item()


def test_other_models_are_left_as_they_are() -> None:
    model = tiny_llama()
    before = [id(module) for _, module in model.named_modules()]
    keep_positions(model)
    assert [id(module) for _, module in model.named_modules()] == before

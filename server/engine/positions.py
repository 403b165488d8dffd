"""Positions in layers that reuse another layer's keys, for rows of a batch that are padded.

There, mlx-lm's AFM (`mlx_lm/models/afm7.py`) takes the number of keys for the position of the tokens. In a
batch that counts a row's padding too, so that every row but the longest would get other answers than alone.
The layer whose keys are reused has just rotated queries of the same tokens by each row's own positions, so
those are taken. The model is changed once, on the thread that owns it.
"""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["keep_positions"]


class _Positions(threading.local):
    """Where the tokens of the forward under way begin: a number, or one for each row (B,).

    Each thread has its own: fusing computes with a copy of the model beside what is being generated.
    """

    offset: int | mx.array = 0


class _Noting(nn.Module):
    """A rotation that notes the positions which it was called with."""

    def __init__(self, rope: Any, positions: _Positions) -> None:
        super().__init__()
        self.rope = rope
        self._positions = positions

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        self._positions.offset = offset
        return self.rope(x, offset=offset)


class _Following(nn.Module):
    """A rotation by the positions that were noted, whatever it is called with."""

    def __init__(self, rope: Any, positions: _Positions) -> None:
        super().__init__()
        self.rope = rope
        self._positions = positions

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        del offset
        return self.rope(x, offset=self._positions.offset)


def keep_positions(model: Any) -> None:
    """Give the layers of `model` that reuse keys, if it has such, the positions of each row."""
    inner = getattr(model, "model", None)
    reusing = getattr(inner, "kv_reuse_layers", None)
    if inner is None or not reusing:
        return
    positions, source = _Positions(), inner.layers[-1].self_attn
    source.rope = _Noting(source.rope, positions)
    for layer in reusing:
        layer.self_attn.rope = _Following(layer.self_attn.rope, positions)

"""Whether a model is bit for bit what it was: its modules, and checksums of its weights made where they lie.

Checksums are taken on the device, so that weights are never copied. Runs on the thread that owns the model.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..layers.targets import named_modules

__all__ = ["changes", "fingerprint"]

_WORDS = 1 << 24  # that are summed at a time, which bounds what this takes of memory
_MULTIPLIER = 2654435761


def fingerprint(model: nn.Module) -> dict[str, object]:
    """What has to stay the same, by path: modules and their modes, types and checksums of arrays."""
    modules = {
        f"module {path}": (id(module), module.training, tuple(sorted(module._no_grad)))
        for path, module in named_modules(model)
    }
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return {**modules, **{f"weights {path}": _checksums(array) for path, array in arrays}}


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The paths at which two fingerprints differ, in order."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _checksums(array: mx.array) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, and two sums modulo 2³² of the words, each times an odd number that its place decides.

    An odd factor can be inverted modulo 2³², so that a change of one word always shows.
    """
    kinds = {1: mx.uint8, 2: mx.uint16}
    words = array.reshape(-1)
    words = words.astype(mx.uint8) if array.dtype == mx.bool_ else words
    words = words.view(kinds.get(array.dtype.size, mx.uint32))
    sums = [mx.array(0, mx.uint32), mx.array(0, mx.uint32)]
    for start in range(0, words.size, _WORDS):
        part = words[start : start + _WORDS].astype(mx.uint32)
        places = mx.arange(start, start + part.size, dtype=mx.uint32)
        factors = (2 * places + 1, mx.bitwise_or(places * mx.array(_MULTIPLIER, mx.uint32), 1))
        sums = [old + mx.sum(part * factor) for old, factor in zip(sums, factors, strict=True)]
        mx.eval(sums)
    first, second = (cast(int, one.item()) for one in sums)
    return str(array.dtype), tuple(array.shape), first, second

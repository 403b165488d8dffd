"""DoRA's factor, m / ‖W + s·Δ‖ (arXiv:2402.09353), where a row or column of W + s·Δ may be zero. Pure."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["dora_factor"]


def dora_factor(magnitude: mx.array, norm: mx.array) -> mx.array:
    """`magnitude` / `norm`, of equal shapes; the magnitude where the norm is zero.

    Rows of zeros (padding of a vocabulary) stay zeros, whatever finite number scales them; 0 / 0 is none.
    """
    return magnitude / mx.where(norm == 0, 1, norm)

"""Base layers and their adapters computed together, in two launches for all projections of one input.

    h = w·A x,   then   o_p = W_p x + B_p h_p,   for DoRA times f_p

As in kernel.py, but W x is computed here as well, so that a group takes two launches in place of one for
each base layer and one more. Sums are in float32, and the base's output and the delta are rounded to the
layer's type before they are added, as mlx-lm does; what the base's sums give differs from MLX's own in their
order alone. Says which layers and rows these kernels compute; knows no routing beyond a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .cuda import Function, make_function
from .layout import GroupLayout
from .plan import Pass
from .with_base_source import (
    INPUTS_MULTIPLE,
    MOST_ROWS,
    OUTPUTS_PER_CLUSTER,
    SHRINK_RANKS,
    THREADS,
    product_blocks,
    product_source,
    shrink_source,
)

__all__ = ["BaseKernels", "base_forward", "base_kernels", "computes_base"]


@dataclass(frozen=True, slots=True)
class BaseKernels:
    """The two kernels for one layout: (x, slab, packed) → h, and (x, h, slab, packed, *weights) → o_p.

    x (B, 1, in), slab (slots, size), packed rows (B, 2), h (B, rank) in float32, weights (out_p, in),
    o_p (B, 1, out_p).
    """

    shrink: Function
    product: Function


def computes_base(layout: GroupLayout, dtype: mx.Dtype, linears: Mapping[str, nn.Module], one: Pass) -> bool:
    """Whether these kernels compute the layers of a group that the kernel of its own computes.

    They want plain weights of half precision without a bias, sizes in whole tiles, and few rows, each with
    an adapter of this layout: a row without one is to have the very bits that the base alone gives it.
    """
    if one.rows is not None or one.packed.shape[0] > MOST_ROWS:
        return False
    if (
        dtype not in (mx.bfloat16, mx.float16)
        or layout.dtype not in (dtype, mx.float32)
        or layout.in_size % INPUTS_MULTIPLE
    ):
        return False
    return all(
        p.out_size % OUTPUTS_PER_CLUSTER == 0 and _is_plain(linears[p.path], dtype)
        for p in layout.projections
    )


def _is_plain(linear: nn.Module, dtype: mx.Dtype) -> bool:
    return type(linear) is nn.Linear and "bias" not in linear and linear.weight.dtype == dtype


def base_kernels(layout: GroupLayout, dtype: mx.Dtype, rows: int) -> BaseKernels:
    """The kernels for `layout`, inputs and outputs of `dtype`, and batches of so many rows."""
    weights = [f"w{index}" for index in range(len(layout.projections))]
    outputs = [f"o{index}" for index in range(len(layout.projections))]
    return BaseKernels(
        make_function(shrink_source(layout, dtype), ["x", "slab", "rows"], ["h"]),
        make_function(product_source(layout, dtype, rows), ["x", "h", "slab", "rows", *weights], outputs),
    )


def base_forward(kernels: BaseKernels, layout: GroupLayout, dtype: mx.Dtype, rows: int) -> Function:
    """(x, slab, packed, *weights) → the outputs of all projections of `layout`, for so many rows."""
    group = {"threadgroup": (THREADS, 1, 1)}
    shrink = group | {
        "grid": (THREADS * -(-layout.rank // SHRINK_RANKS), rows, 1),
        "output_shapes": [(rows, layout.rank)],
        "output_dtypes": [mx.float32],
    }
    product = group | {
        "grid": (THREADS * product_blocks(layout, rows), 1, 1),
        "output_shapes": [(rows, 1, projection.out_size) for projection in layout.projections],
        "output_dtypes": [dtype] * len(layout.projections),
    }

    def forward(x: mx.array, slab: mx.array, packed: mx.array, *weights: mx.array) -> Sequence[mx.array]:
        [h] = kernels.shrink(inputs=[x, slab, packed], **shrink)
        return kernels.product(inputs=[x, h, slab, packed, *weights], **product)

    return forward

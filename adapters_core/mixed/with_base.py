"""Base layers and their adapters computed together, in two launches for all projections of one input.

    h = w·A x,   then   o_p = W_p x + B_p h_p,   for DoRA times f_p

As in kernel.py, but W x is computed here as well, so that a group takes two launches in place of one for
each base layer and one more. Sums are in float32, and the base's output and the delta are rounded to the
layer's type before they are added, as mlx-lm does; what the base's sums give differs from MLX's own in their
order alone. Says which layers and rows these kernels compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from .cuda import Function, make_function
from .launches import MOST_PROJECTIONS, Launch
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

__all__ = ["base_forward", "computes_base", "is_plain", "product_kernel", "shrink_kernel"]


def computes_base(launch: Launch, dtype: mx.Dtype, linears: Mapping[str, nn.Module]) -> bool:
    """Whether these kernels compute the layers of a launch that the kernel of its own computes.

    They want plain weights of half precision without a bias, sizes in whole tiles, and few rows. The caller
    sees to it that every row has an adapter: one without is to have the very bits that the base alone gives.
    """
    if launch.rows.shape[0] > MOST_ROWS or launch.in_size % INPUTS_MULTIPLE:
        return False
    if dtype not in (mx.bfloat16, mx.float16) or launch.dtype not in (dtype, mx.float32):
        return False
    return all(
        size % OUTPUTS_PER_CLUSTER == 0 and is_plain(linears[path], dtype)
        for path, size in zip(launch.paths, launch.sizes, strict=True)
    )


def is_plain(linear: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether a layer is a product with weights of `dtype` and nothing else."""
    return type(linear) is nn.Linear and "bias" not in linear and linear.weight.dtype == dtype


def shrink_kernel(dtype: mx.Dtype, factors: mx.Dtype, stacks: int) -> Function:
    """(x, rows, table, *slabs) → h: x (B, 1, in), slabs (slots, size), h (B, rank) in float32."""
    slabs = [f"s{at}" for at in range(stacks)]
    return make_function(shrink_source(dtype, factors, stacks), ["x", "rows", "table", *slabs], ["h"])


def product_kernel(dtype: mx.Dtype, factors: mx.Dtype, stacks: int, rows: int, in_size: int) -> Function:
    """(x, h, rows, table, *slabs, *weights) → o_p: weights (out_p, in), o_p (B, 1, out_p)."""
    places = range(MOST_PROJECTIONS)
    inputs = ["x", "h", "rows", "table", *(f"s{at}" for at in range(stacks)), *(f"w{at}" for at in places)]
    text = product_source(dtype, factors, stacks, rows, in_size)
    return make_function(text, inputs, [f"o{at}" for at in places])


def base_forward(shrink: Function, product: Function, launch: Launch, dtype: mx.Dtype) -> Function:
    """(x, rows, table, *slabs, *weights) → the outputs of all projections, for launches like `launch`."""
    rows, missing = launch.rows.shape[0], MOST_PROJECTIONS - len(launch.sizes)
    group = {"threadgroup": (THREADS, 1, 1)}
    shrunk = group | {
        "grid": (THREADS * -(-launch.rank // SHRINK_RANKS), rows, 1),
        "output_shapes": [(rows, launch.rank)],
        "output_dtypes": [mx.float32],
    }
    made = group | {
        "grid": (THREADS * product_blocks(launch.sizes, rows), 1, 1),
        "output_shapes": [*((rows, 1, size) for size in launch.sizes), *([(1,)] * missing)],
        "output_dtypes": [dtype] * MOST_PROJECTIONS,
    }

    def forward(x: mx.array, rows: mx.array, table: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
        slabs, weights = arrays[: -len(launch.sizes)], arrays[-len(launch.sizes) :]
        [h] = shrink(inputs=[x, rows, table, *slabs], **shrunk)
        weights += weights[:1] * missing
        return product(inputs=[x, h, rows, table, *slabs, *weights], **made)[: len(launch.sizes)]

    return forward

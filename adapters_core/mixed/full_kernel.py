"""Base layers and their adapters computed together, in two launches for all projections of one input.

    h = w·A x,   then   o_p = W_p x + B_p h_p,   for DoRA times f_p

As in kernel.py, but W x is computed here as well, so that a group takes two launches in place of one for
each base layer and one more. Sums are in float32, and the base's output and the delta are
rounded to the layer's type before they are added, as mlx-lm does; what the base's sums give differs from
MLX's own in their order alone. Says which layers and rows these kernels compute; knows no routing beyond a
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from .full_kernel_source import (
    INPUTS_MULTIPLE,
    MOST_ROWS,
    OUTPUTS_PER_CLUSTER,
    SHRINK_RANKS,
    THREADS,
    full_blocks,
    full_kernel_source,
    row_tiles,
    shrink_source,
)
from .layout import GroupLayout
from .plan import Pass

__all__ = ["FullKernels", "full_fits", "full_forward", "full_kernels"]

_Function = Callable[..., Sequence[mx.array]]


@dataclass(frozen=True, slots=True)
class FullKernels:
    """The two kernels for one layout: (x, slab, packed) → h, and (x, h, slab, packed, *weights) → o_p."""

    shrink: _Function
    product: _Function


def full_fits(layout: GroupLayout, dtype: mx.Dtype, linears: Mapping[str, nn.Module], one: Pass) -> bool:
    """Whether these kernels compute the layers of a group that the kernel of its own computes.

    They want plain weights of half precision without a bias, sizes in whole tiles, and few rows, each with
    an adapter: a row without one is to have the very bits that the base alone gives it.
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


def full_kernels(layout: GroupLayout, dtype: mx.Dtype, tiles: int) -> FullKernels:
    """The kernels for `layout`, inputs and outputs of `dtype`, and batches of so many tiles of rows."""
    weights = [f"w{index}" for index in range(len(layout.projections))]
    outputs = [f"o{index}" for index in range(len(layout.projections))]
    return FullKernels(
        _kernel(shrink_source(layout, dtype), ["x", "slab", "rows"], ["h"]),
        _kernel(full_kernel_source(layout, dtype, tiles), ["x", "h", "slab", "rows", *weights], outputs),
    )


def _kernel(text: tuple[str, str, str], inputs: list[str], outputs: list[str]) -> _Function:
    name, header, source = text
    kernel = mx.fast.cuda_kernel(
        name=name, input_names=inputs, output_names=outputs, header=header, source=source
    )
    return cast(_Function, kernel)


def full_forward(kernels: FullKernels, layout: GroupLayout, dtype: mx.Dtype, rows: int) -> _Function:
    """(x, slab, packed, *weights) → the outputs of all projections of `layout`, for so many rows."""
    group = {"threadgroup": (THREADS, 1, 1)}
    shrink = group | {
        "grid": (THREADS * -(-layout.rank // SHRINK_RANKS), rows, 1),
        "output_shapes": [(rows, layout.rank)],
        "output_dtypes": [mx.float32],
    }
    product = group | {
        "grid": (THREADS * full_blocks(layout, row_tiles(rows)), 1, 1),
        "output_shapes": [(rows, 1, projection.out_size) for projection in layout.projections],
        "output_dtypes": [dtype] * len(layout.projections),
    }

    def forward(x: mx.array, slab: mx.array, packed: mx.array, *weights: mx.array) -> Sequence[mx.array]:
        [h] = kernels.shrink(inputs=[x, slab, packed], **shrink)
        return kernels.product(inputs=[x, h, slab, packed, *weights], **product)

    return forward

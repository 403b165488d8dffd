"""Decoding on CUDA: one kernel adds the low-rank terms to the outputs of all projections of one input.

    o_p = y_p + w·B_p (A_p x)     for each row, with the factors of the row's slot; y_p where it has none;
    o_p = f_p ⊙ (y_p + w·B_p (A_p x))                                                  for DoRA

Launches are what adapters cost on a GPU, not arithmetic, so shrink, expand, scale and addition are one. A
row's input is split over a cluster of eight blocks, which add their parts of A x up through distributed
shared memory (NVIDIA Hopper and later; elsewhere each block computes all of it); each block then writes an
eighth of the outputs. Sums are in float32, and the delta is rounded to the layer's type before it is added,
as mlx-lm does. Knows no routing beyond a pass's packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn

from .fused_source import kernel_source
from .layers import compute_dtype
from .layout import GroupLayout

if TYPE_CHECKING:
    from .routing import Pass
    from .stacks import Stack

__all__ = ["Call", "Kernels", "on_cuda", "plan_calls", "run_calls"]

_THREADS = 256
_BLOCKS = 8  # for each row; also the size of a cluster, which is the most that every such GPU allows
_THREADGROUP = (_THREADS, 1, 1)
_LARGEST_RANK = 4096  # of a group: two floats each, of the 48 KiB that a block has
_CLUSTERS_SINCE = 9  # major compute capability

_Kernel = Callable[..., Sequence[mx.array]]


def on_cuda() -> bool:
    """Whether MLX's default device is a CUDA GPU."""
    return mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()


class Kernels:
    """One kernel for each shape of group and type of input, made when first asked for."""

    def __init__(self) -> None:
        capability = mx.device_info(mx.default_device()).get("compute_capability_major", 0)
        self._clusters = int(capability) >= _CLUSTERS_SINCE
        self._made: dict[str, _Kernel] = {}

    def get(self, layout: GroupLayout, dtype: mx.Dtype) -> _Kernel:
        """The kernel for inputs and outputs of `dtype` and factors in `layout`.

        x (B, 1, in), slab (slots, size), packed rows (B, 2), y_p (B, 1, out_p) → o_p (B, 1, out_p).
        """
        name, header, source = kernel_source(layout, dtype, _THREADS, _BLOCKS, self._clusters)
        if name not in self._made:
            count = len(layout.projections)
            kernel = mx.fast.cuda_kernel(
                name=name,
                input_names=["x", "slab", "rows", *(f"y{index}" for index in range(count))],
                output_names=[f"o{index}" for index in range(count)],
                header=header,
                source=source,
            )
            self._made[name] = cast(_Kernel, kernel)
        return self._made[name]


@dataclass(frozen=True, slots=True)
class Call:
    """One launch for one batch: the kernel, what it reads beside the input, and the form of what it writes.

    `paths` are the layers in the kernel's order, `bases` their base layers' forwards.
    """

    kernel: _Kernel
    stack: Stack
    packed: mx.array
    paths: tuple[str, ...]
    bases: tuple[Callable[[mx.array], mx.array], ...]
    grid: tuple[int, int, int]
    shapes: list[tuple[int, int, int]]
    dtypes: list[mx.Dtype]


def plan_calls(
    steps: Sequence[tuple[Pass, Stack]],
    dtype: mx.Dtype,
    kernels: Kernels,
    linears: Mapping[str, nn.Module],
) -> tuple[Call, ...] | None:
    """The launches that compute `steps` for inputs of `dtype`, in order; None where the kernel cannot."""
    if not all(_fits(stack.layout, dtype, linears) for _, stack in steps):
        return None
    calls = []
    for one, stack in steps:
        projections = stack.layout.projections
        rows = one.packed.shape[0]
        calls.append(
            Call(
                kernel=_kernel_of(stack, dtype, kernels),
                stack=stack,
                packed=one.packed,
                paths=tuple(p.path for p in projections),
                bases=tuple(linears[p.path].__call__ for p in projections),
                grid=(_THREADS * _BLOCKS, rows, 1),
                shapes=[(rows, 1, p.out_size) for p in projections],
                dtypes=[dtype] * len(projections),
            )
        )
    return tuple(calls)


def _kernel_of(stack: Stack, dtype: mx.Dtype, kernels: Kernels) -> _Kernel:
    """The kernel for a stack, which keeps it: to make its text takes longer than to lay out a batch."""
    if dtype not in stack.kernels:
        stack.kernels[dtype] = kernels.get(stack.layout, dtype)
    return stack.kernels[dtype]


def run_calls(x: mx.array, calls: Sequence[Call]) -> dict[str, mx.array]:
    """The outputs (B, 1, out) of all layers that the calls touch, by path, for x (B, 1, in)."""
    outputs: dict[str, mx.array] = {}
    for call in calls:
        if outputs:
            layers = zip(call.paths, call.bases, strict=True)
            ys = [outputs[path] if path in outputs else base(x) for path, base in layers]
        else:
            ys = [base(x) for base in call.bases]
        found = call.kernel(
            inputs=[x, call.stack.slab, call.packed, *ys],
            grid=call.grid,
            threadgroup=_THREADGROUP,
            output_shapes=call.shapes,
            output_dtypes=call.dtypes,
        )
        outputs.update(zip(call.paths, found, strict=True))
    return outputs


def _fits(layout: GroupLayout, dtype: mx.Dtype, linears: Mapping[str, nn.Module]) -> bool:
    """Whether the kernel computes this.

    It wants whole vectors of 16 bytes, outputs of the input's type, sums that fit into a block's own memory,
    and no bias that DoRA would scale.
    """
    if dtype.size > layout.dtype.size or not mx.issubdtype(dtype, mx.floating) or layout.rank > _LARGEST_RANK:
        return False
    if any(compute_dtype(linears[p.path], dtype) != dtype for p in layout.projections):
        return False
    width = 16 // layout.dtype.size
    if layout.in_size % width or any(p.out_size % width for p in layout.projections):
        return False
    return not layout.is_dora or all(linears[p.path].get("bias") is None for p in layout.projections)

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
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from .fused_source import kernel_source
from .layout import GroupLayout

if TYPE_CHECKING:
    from .mixed import MixedLinear
    from .routing import Pass
    from .stacks import Stack

__all__ = ["Kernels", "fused_outputs", "make_kernels"]

_THREADS = 256
_BLOCKS = 8  # for each row; also the size of a cluster, which is the most that every such GPU allows
_CLUSTERS_SINCE = 90  # compute capability, times ten


def make_kernels() -> Kernels | None:
    """The kernels for MLX's default device; None unless that is a CUDA GPU."""
    device = mx.default_device()
    if device.type != mx.DeviceType.gpu or not mx.cuda.is_available():
        return None
    return Kernels(_capability(mx.device_info(device)) >= _CLUSTERS_SINCE)


class Kernels:
    """One kernel for each shape of group and type of input, made when first asked for."""

    def __init__(self, clusters: bool) -> None:
        self._clusters = clusters
        self._made: dict[tuple[object, ...], _Kernel] = {}

    def get(self, layout: GroupLayout, dtype: mx.Dtype) -> _Kernel:
        """The kernel for inputs and outputs of `dtype` and factors in `layout`."""
        sizes = tuple((p.rank, p.out_size) for p in layout.projections)
        key = (sizes, layout.in_size, layout.is_dora, layout.dtype, dtype)
        if key not in self._made:
            self._made[key] = _Kernel(layout, dtype, self._clusters)
        return self._made[key]


class _Kernel:
    """x (B, 1, in), slab (slots, size), packed rows (B, 2), y_p (B, 1, out_p) → o_p (B, 1, out_p)."""

    def __init__(self, layout: GroupLayout, dtype: mx.Dtype, clusters: bool) -> None:
        count = len(layout.projections)
        name, header, source = kernel_source(layout, dtype, _THREADS, _BLOCKS, clusters)
        self._run: Callable[..., Sequence[mx.array]] = mx.fast.cuda_kernel(  # pyright: ignore[reportAttributeAccessIssue] (typed as object)
            name=name,
            input_names=["x", "slab", "rows", *(f"y{index}" for index in range(count))],
            output_names=[f"o{index}" for index in range(count)],
            header=header,
            source=source,
        )
        self._dtypes = [dtype] * count

    def __call__(
        self, x: mx.array, slab: mx.array, packed: mx.array, ys: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        return self._run(
            inputs=[x, slab, packed, *ys],
            grid=(_THREADS * _BLOCKS, x.shape[0], 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[y.shape for y in ys],
            output_dtypes=self._dtypes,
        )


def fused_outputs(
    x: mx.array,
    layers: Mapping[str, MixedLinear],
    steps: Sequence[tuple[Pass, Stack]],
    kernels: Kernels,
) -> dict[str, mx.array] | None:
    """The outputs of all layers that `steps` touch, by path; None where the kernel cannot or should not."""
    if x.ndim != 3 or x.shape[1] != 1:
        return None
    if not all(_fits(stack.layout, x.dtype, layers) for _, stack in steps):
        return None
    outputs: dict[str, mx.array] = {}
    for one, stack in steps:
        paths = stack.layout.ranks
        ys = [outputs[path] if path in outputs else layers[path].linear(x) for path in paths]
        found = kernels.get(stack.layout, x.dtype)(x, stack.slab, one.packed, ys)
        outputs.update(zip(paths, found, strict=True))
    return outputs


def _fits(layout: GroupLayout, dtype: mx.Dtype, layers: Mapping[str, MixedLinear]) -> bool:
    """Whether the kernel computes this: whole vectors of 16 bytes, and no bias that DoRA would scale."""
    if dtype.size > layout.dtype.size or not mx.issubdtype(dtype, mx.floating):
        return False
    width = 16 // layout.dtype.size
    if layout.in_size % width or any(p.out_size % width for p in layout.projections):
        return False
    return not layout.is_dora or all(_has_no_bias(layers[p.path].linear) for p in layout.projections)


def _has_no_bias(linear: nn.Module) -> bool:
    return linear.get("bias") is None


def _capability(info: Mapping[str, object]) -> int:
    """Compute capability times ten; 0 where MLX does not say."""
    digits = "".join(character for character in str(info.get("architecture", "")) if character.isdigit())
    return int(digits or 0)

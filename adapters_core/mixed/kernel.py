"""Decoding on CUDA: one kernel adds the low-rank terms to the outputs of all projections of one input.

    o_p = y_p + w·B_p (A_p x)     for each row, with the factors of the row's slot; y_p where it has none;
    o_p = f_p ⊙ (y_p + w·B_p (A_p x))                                                  for DoRA

Launches are what adapters cost on a GPU, not arithmetic, so shrink, expand, scale and addition are one. A
row's input is split over a cluster of eight blocks, which add their parts of A x up through distributed
shared memory (NVIDIA Hopper and later; elsewhere each block computes all of it); each block then writes an
eighth of the outputs. Sums are in float32, and the delta is rounded to the layer's type before it is added,
as mlx-lm does. The base layers of a group and the kernel are compiled to one function, because the host is
slower at building graphs than the GPU at computing them. Where with_base.py can, it takes the place of
both. Knows no routing beyond a pass's packed rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.modules import compute_dtype
from .cuda import Function, make_function
from .kernel_source import kernel_source
from .layout import GroupLayout
from .plan import Pass
from .stacks import Stack
from .with_base import BaseKernels, base_forward, base_kernels, computes_base

__all__ = ["Call", "Kernels", "on_cuda", "plan_calls", "run_calls"]

_THREADS = 256
_BLOCKS = 8  # for each row; also the size of a cluster, which is the most that every such GPU allows
_LARGEST_RANK = 4096  # of a group: two floats each, of the 48 KiB that a block has
_CLUSTERS_SINCE = 9  # major compute capability
_MOST_COMPILED = 1024  # functions, for as many sizes of batch and stack; then all are made anew


def on_cuda() -> bool:
    """Whether MLX's default device is a CUDA GPU."""
    return mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()


class Kernels:
    """One kernel for each shape of group and type of input, made when first asked for.

    `clusters` says whether the GPU has clusters of blocks; None finds out. For a benchmark, `with_base`
    False leaves all base layers to MLX, and `compiles` False does so and keeps them apart from the kernel.
    """

    def __init__(self, compiles: bool = True, with_base: bool = True, clusters: bool | None = None) -> None:
        capability = mx.device_info(mx.default_device()).get("compute_capability_major", 0)
        self._clusters = int(capability) >= _CLUSTERS_SINCE if clusters is None else clusters
        self._compiles = compiles
        self._with_base = with_base and compiles and self._clusters
        self._made: dict[str, Function] = {}
        self._compiled: dict[tuple[Any, ...], Function] = {}

    def get(self, layout: GroupLayout, dtype: mx.Dtype) -> Function:
        """The kernel for inputs and outputs of `dtype` and factors in `layout`.

        x (B, 1, in), slab (slots, size), packed rows (B, 2), y_p (B, 1, out_p) → o_p (B, 1, out_p).
        """
        text = kernel_source(layout, dtype, _THREADS, _BLOCKS, self._clusters)
        if text.name not in self._made:
            places = range(len(layout.projections))
            inputs = ["x", "slab", "rows", *(f"y{place}" for place in places)]
            self._made[text.name] = make_function(text, inputs, [f"o{place}" for place in places])
        return self._made[text.name]

    def base_kernels(self, layout: GroupLayout, dtype: mx.Dtype, rows: int) -> BaseKernels:
        """The kernels that compute base layers as well, for batches of so many rows."""
        return base_kernels(layout, dtype, rows)

    def compiled(
        self, kernel: Function, one: Pass, stack: Stack, dtype: mx.Dtype, linears: Mapping[str, nn.Module]
    ) -> Function | None:
        """The layers of a group as one function of (x, slab, packed, *the arrays of the layers).

        Layers of the same form share it. None if these are not to be compiled.
        """
        layout, rows = stack.layout, one.packed.shape[0]
        mine = [linears[projection.path] for projection in layout.projections]
        if not self._compiles or any(type(linear) not in (nn.Linear, nn.QuantizedLinear) for linear in mine):
            return None
        with_base = self._with_base and computes_base(layout, dtype, linears, one)
        key = (kernel, with_base, rows, stack.slab.shape[0], *(_form(linear) for linear in mine))
        if key not in self._compiled:
            if len(self._compiled) >= _MOST_COMPILED:
                self._compiled.clear()
            if with_base:
                found = base_forward(self.base_kernels(layout, dtype, rows), layout, dtype, rows)
            else:
                # Copies to put other layers' arrays into while the function is traced.
                copies = [copy.copy(linear) for linear in mine]
                found = _forward(kernel, _kernel_form(layout, dtype, rows), copies)
            self._compiled[key] = mx.compile(found)
        return self._compiled[key]


def _kernel_form(layout: GroupLayout, dtype: mx.Dtype, rows: int) -> dict[str, Any]:
    """How `Kernels.get` is launched for a batch of so many rows, and the form of what it writes."""
    return {
        "grid": (_THREADS * _BLOCKS, rows, 1),
        "threadgroup": (_THREADS, 1, 1),
        "output_shapes": [(rows, 1, projection.out_size) for projection in layout.projections],
        "output_dtypes": [dtype] * len(layout.projections),
    }


def _forward(kernel: Function, form: dict[str, Any], linears: Sequence[nn.Module]) -> Function:
    def forward(x: mx.array, slab: mx.array, packed: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
        left = iter(arrays)
        for linear in linears:
            for name in _array_names(linear):
                linear[name] = next(left)
        return kernel(inputs=[x, slab, packed, *(linear(x) for linear in linears)], **form)

    return forward


def _form(linear: nn.Module) -> tuple[Any, ...]:
    """What decides how a layer computes, beside the shapes that its group's kernel has in it."""
    settings = (getattr(linear, name, None) for name in ("bits", "group_size", "mode"))
    return (type(linear), *settings, *((name, linear[name].dtype) for name in _array_names(linear)))


def _array_names(linear: nn.Module) -> list[str]:
    return [name for name, value in linear.items() if isinstance(value, mx.array)]


@dataclass(frozen=True, slots=True)
class Call:
    """One launch for one batch: the kernel, what it reads beside the input, and the form of what it writes.

    `paths` are the layers in the kernel's order, `bases` their base layers' forwards. `compiled` computes
    these as well, from `arrays`; None where they cannot be compiled, and in a later call, which adds to what
    the first computed.
    """

    kernel: Function
    form: dict[str, Any]
    stack: Stack
    packed: mx.array
    paths: tuple[str, ...]
    bases: tuple[Callable[[mx.array], mx.array], ...]
    compiled: Function | None
    arrays: tuple[mx.array, ...]


def plan_calls(
    steps: Sequence[tuple[Pass, Stack]],
    dtype: mx.Dtype,
    kernels: Kernels,
    linears: Mapping[str, nn.Module],
) -> tuple[Call, ...] | None:
    """The launches that compute `steps` for inputs of `dtype`, in order; None where the kernel cannot."""
    if not all(_fits(stack.layout, dtype, linears) for _, stack in steps):
        return None
    return tuple(
        _plan_call(one, stack, dtype, kernels, linears, is_first=at == 0)
        for at, (one, stack) in enumerate(steps)
    )


def _plan_call(
    one: Pass,
    stack: Stack,
    dtype: mx.Dtype,
    kernels: Kernels,
    linears: Mapping[str, nn.Module],
    *,
    is_first: bool,
) -> Call:
    projections = stack.layout.projections
    mine = [linears[projection.path] for projection in projections]
    kernel = _kernel_of(stack, dtype, kernels)
    return Call(
        kernel=kernel,
        form=_kernel_form(stack.layout, dtype, one.packed.shape[0]),
        stack=stack,
        packed=one.packed,
        paths=tuple(projection.path for projection in projections),
        bases=tuple(linear.__call__ for linear in mine),
        compiled=kernels.compiled(kernel, one, stack, dtype, linears) if is_first else None,
        arrays=tuple(linear[name] for linear in mine for name in _array_names(linear)),
    )


def _kernel_of(stack: Stack, dtype: mx.Dtype, kernels: Kernels) -> Function:
    """The kernel for a stack, which keeps it: to make its text takes longer than to lay out a batch."""
    if dtype not in stack.kernels:
        stack.kernels[dtype] = kernels.get(stack.layout, dtype)
    return stack.kernels[dtype]


def run_calls(x: mx.array, calls: Sequence[Call]) -> dict[str, mx.array]:
    """The outputs (B, 1, out) of all layers that the calls touch, by path, for x (B, 1, in)."""
    outputs: dict[str, mx.array] = {}
    for call in calls:
        if call.compiled is not None:
            found = call.compiled(x, call.stack.slab, call.packed, *call.arrays)
        else:
            layers = zip(call.paths, call.bases, strict=True)
            ys = [outputs[path] if path in outputs else base(x) for path, base in layers]
            found = call.kernel(inputs=[x, call.stack.slab, call.packed, *ys], **call.form)
        outputs.update(zip(call.paths, found, strict=True))
    return outputs


def _fits(layout: GroupLayout, dtype: mx.Dtype, linears: Mapping[str, nn.Module]) -> bool:
    """Whether the kernel computes this.

    It wants whole vectors of 16 bytes, outputs of the input's type, sums that fit into a block's own memory,
    and no bias, neither of a layer whose DoRA would scale it nor of the adapter's own.
    """
    if layout.has_bias:
        return False
    if dtype.size > layout.dtype.size or not mx.issubdtype(dtype, mx.floating) or layout.rank > _LARGEST_RANK:
        return False
    if any(compute_dtype(linears[p.path], dtype) != dtype for p in layout.projections):
        return False
    width = 16 // layout.dtype.size
    if layout.in_size % width or any(p.out_size % width for p in layout.projections):
        return False
    return not layout.is_dora or all(linears[p.path].get("bias") is None for p in layout.projections)

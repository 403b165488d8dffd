"""Decoding on CUDA: one kernel adds the low-rank terms to the outputs of all projections of one input.

    o_p = y_p + w·B_p (A_p x)     for each row, with the factors of the row's slot; y_p where it has none;
    o_p = f_p ⊙ (y_p + w·B_p (A_p x))                                                  for DoRA

Launches are what adapters cost on a GPU, not arithmetic, so shrink, expand, scale and addition are one, and
rows of any ranks, targets and kinds share it (launches.py). A row's input is split over a cluster of eight
blocks, which add their parts of A x up through distributed shared memory (where `has_clusters`; elsewhere
each block computes all of it); each block then writes an eighth of the outputs. Sums are in float32, and the
delta is rounded to the layer's type before it is added, as mlx-lm does. The base layers of a group and the
kernel are compiled to one function, because the host is slower at building graphs than the GPU at computing
them. Where with_base.py can, it takes the place of both.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.modules import compute_dtype, weight_shape
from .cuda import TYPES, Function, has_clusters, make_function
from .kernel_source import LARGEST_RANK, add_source, rank_class
from .launches import MOST_PROJECTIONS, STACK_COUNTS, Launch, make_launch, plan_launches
from .layout import GroupLayout, Projection
from .plan import BatchPlan, Pass
from .stacks import Stack
from .with_base import base_forward, computes_base, is_plain, product_kernel, shrink_kernel
from .with_base_source import INPUTS_MULTIPLE, OUTPUTS_PER_CLUSTER, TILED_ROWS, unrolled

__all__ = ["Call", "Kernels", "on_cuda", "plan_calls", "run_calls"]

_THREADS = 256
_BLOCKS = 8  # for each row; also the size of a cluster, which is the most that every such GPU allows
_MOST_COMPILED = 1024  # functions, for as many sizes of batch and stack; then all are made anew


def on_cuda() -> bool:
    """Whether MLX's default device is a CUDA GPU."""
    return mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()


class Kernels:
    """The kernels, each made when first asked for.

    `clusters` says whether kernels run in clusters of blocks; None finds out. For a benchmark, `with_base`
    False leaves all base layers to MLX, and `compiles` False does so and keeps them apart from the kernel.
    """

    def __init__(self, compiles: bool = True, with_base: bool = True, clusters: bool | None = None) -> None:
        self._clusters = has_clusters() if clusters is None else clusters
        self._compiles = compiles
        self._with_base = with_base and compiles and self._clusters
        self._made: dict[tuple[Any, ...], Function] = {}
        self._compiled: dict[tuple[Any, ...], Function] = {}

    def add(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int, ranks: int) -> Function:
        """The kernel for inputs and outputs of `dtype`: (x, rows, table, *slabs, *ys) → outputs.

        x (B, 1, in), slabs (slots, size) of `factors`, y_p (B, 1, out_p) → o_p (B, 1, out_p).
        """
        text = add_source(dtype, factors, stacks, ranks, _THREADS, _BLOCKS, self._clusters)
        places = range(MOST_PROJECTIONS)
        slabs, ys = [f"s{at}" for at in range(stacks)], [f"y{at}" for at in places]
        return make_function(text, ["x", "rows", "table", *slabs, *ys], [f"o{at}" for at in places])

    def shrink(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int) -> Function:
        """The first of the two kernels that compute base layers as well."""
        return shrink_kernel(dtype, factors, stacks)

    def product(self, dtype: mx.Dtype, factors: mx.Dtype, stacks: int, rows: int, in_size: int) -> Function:
        """The second of them, for batches of so many rows."""
        return product_kernel(dtype, factors, stacks, rows, in_size)

    def adding(self, launch: Launch, dtype: mx.Dtype) -> Function:
        """(x, rows, table, *slabs, *ys) → the outputs of all projections, for launches like `launch`."""
        key = dtype, launch.dtype, len(launch.stacks), rank_class(launch.rank)
        kernel = self._kept(("add", *key), lambda: self.add(*key))
        rows, missing = launch.rows.shape[0], MOST_PROJECTIONS - len(launch.sizes)
        form: dict[str, Any] = {
            "grid": (_THREADS * _BLOCKS, rows, 1),
            "threadgroup": (_THREADS, 1, 1),
            "output_shapes": [*((rows, 1, size) for size in launch.sizes), *([(1,)] * missing)],
            "output_dtypes": [dtype] * MOST_PROJECTIONS,
        }
        count = len(launch.sizes)

        def forward(x: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
            return kernel(inputs=[x, *arrays, *(arrays[-1:] * missing)], **form)[:count]

        return forward

    def warm(self, dtype: mx.Dtype, linears: Sequence[nn.Module]) -> int:
        """Compile the texts for adapters of `linears`, by launching each on zeros; returns how many.

        Ranks above 512 in one group are left out: their text is compiled when one comes.
        """
        done: list[Sequence[mx.array]] = []
        dtypes = [one for one in (dtype, mx.float32) if one.size >= dtype.size]
        for factors, stacks in itertools.product(dict.fromkeys(dtypes), STACK_COUNTS):
            launch = _empty_launch(1, INPUTS_MULTIPLE, factors, stacks)
            x = mx.zeros((1, 1, launch.in_size), dtype)
            y = mx.zeros((1, 1, *launch.sizes), dtype)
            done.append(self.adding(launch, dtype)(x, launch.rows, launch.table, *launch.slabs, y))
        plain = [linear for linear in linears if is_plain(linear, dtype)] if self._with_base else []
        steps = {unrolled(weight_shape(linear)[1]) for linear in plain}
        for factors, stacks, step in itertools.product(dict.fromkeys(dtypes), STACK_COUNTS, sorted(steps)):
            for rows in TILED_ROWS:
                launch = _empty_launch(rows, step * INPUTS_MULTIPLE, factors, stacks)
                x = mx.zeros((rows, 1, launch.in_size), dtype)
                weight = mx.zeros((*launch.sizes, launch.in_size), dtype)
                forward = self._forward(launch, dtype, plain[:1], with_base=True)
                done.append(forward(x, launch.rows, launch.table, *launch.slabs, weight))
        mx.eval(done)
        return len(self._made)

    def compiled(
        self, launch: Launch, dtype: mx.Dtype, linears: Mapping[str, nn.Module], all_adapted: bool
    ) -> Function | None:
        """The layers of a group as one function of (x, rows, table, *slabs, *the arrays of the layers).

        Layers of the same form share it. None if these are not to be compiled.
        """
        mine = [linears[path] for path in launch.paths]
        if not self._compiles or any(type(linear) not in (nn.Linear, nn.QuantizedLinear) for linear in mine):
            return None
        with_base = self._with_base and all_adapted and computes_base(launch, dtype, linears)
        rows, slabs = launch.rows.shape[0], tuple(slab.shape for slab in launch.slabs)
        key = (with_base, dtype, launch.dtype, rows, launch.in_size, launch.sizes, launch.rank, slabs)
        key += tuple(_form(linear) for linear in mine)
        if key not in self._compiled:
            if len(self._compiled) >= _MOST_COMPILED:
                self._compiled.clear()
            self._compiled[key] = mx.compile(self._forward(launch, dtype, mine, with_base))
        return self._compiled[key]

    def _forward(
        self, launch: Launch, dtype: mx.Dtype, linears: Sequence[nn.Module], with_base: bool
    ) -> Function:
        if not with_base:
            # Copies to put other layers' arrays into while the function is traced.
            return _with_layers(self.adding(launch, dtype), len(launch.stacks), list(map(copy.copy, linears)))
        key = dtype, launch.dtype, len(launch.stacks)
        shrink = self._kept(("shrink", *key), lambda: self.shrink(*key))
        shape = launch.rows.shape[0], launch.in_size
        product = self._kept(("product", *key, *shape), lambda: self.product(*key, *shape))
        return base_forward(shrink, product, launch, dtype)

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Function]) -> Function:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _empty_launch(rows: int, in_size: int, factors: mx.Dtype, stacks: int) -> Launch:
    """A launch of rows that all compute with factors of zeros, in one stack that is given so many times."""
    stack = Stack(GroupLayout((Projection("", 4, in_size, OUTPUTS_PER_CLUSTER),), False, factors))
    stack.grow(1)
    return make_launch([stack] * stacks, mx.zeros((rows, 4), mx.int32), BatchPlan([()] * rows, {}))


def _with_layers(adding: Function, stacks: int, linears: Sequence[nn.Module]) -> Function:
    def forward(x: mx.array, rows: mx.array, table: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
        left = iter(arrays[stacks:])
        for linear in linears:
            for name in _array_names(linear):
                linear[name] = next(left)
        return adding(x, rows, table, *arrays[:stacks], *(linear(x) for linear in linears))

    return forward


def _form(linear: nn.Module) -> tuple[Any, ...]:
    """What decides how a layer computes, beside the sizes of its launch."""
    settings = (getattr(linear, name, None) for name in ("bits", "group_size", "mode"))
    return (type(linear), *settings, *((name, linear[name].dtype) for name in _array_names(linear)))


def _array_names(linear: nn.Module) -> list[str]:
    return [name for name, value in linear.items() if isinstance(value, mx.array)]


@dataclass(frozen=True, slots=True)
class Call:
    """One launch for one batch: `function` of (x, rows, table, *slabs, …) gives the outputs of its layers.

    Where the layers are compiled with it, their `arrays` follow. Else, and in a later call, which adds to
    what an earlier one computed, `arrays` is None, and the layers' outputs so far follow, at first those of
    their `bases`.
    """

    launch: Launch
    function: Function
    arrays: tuple[mx.array, ...] | None
    bases: tuple[Callable[[mx.array], mx.array], ...]


def plan_calls(
    steps: Sequence[tuple[Pass, Stack]],
    plan: BatchPlan,
    dtype: mx.Dtype,
    kernels: Kernels,
    linears: Mapping[str, nn.Module],
) -> tuple[Call, ...] | None:
    """The launches that compute `steps` for inputs of `dtype`, in order; None where the kernel cannot."""
    paths = {path for _, stack in steps for path in stack.layout.ranks}
    if len(paths) > MOST_PROJECTIONS or not all(_fits(stack, dtype, linears) for _, stack in steps):
        return None
    calls: list[Call] = []
    for launch in plan_launches(steps, plan):
        mine = [linears[path] for path in launch.paths]
        is_first = not any(set(launch.paths) & set(call.launch.paths) for call in calls)
        compiled = kernels.compiled(launch, dtype, linears, plan.all_adapted) if is_first else None
        calls.append(
            Call(
                launch,
                compiled or kernels.adding(launch, dtype),
                tuple(linear[name] for linear in mine for name in _array_names(linear)) if compiled else None,
                tuple(linear.__call__ for linear in mine),
            )
        )
    return tuple(calls)


def run_calls(x: mx.array, calls: Iterable[Call]) -> dict[str, mx.array]:
    """The outputs (B, 1, out) of all layers that the calls touch, by path, for x (B, 1, in)."""
    outputs: dict[str, mx.array] = {}
    for call in calls:
        launch, arrays = call.launch, call.arrays
        if arrays is None:
            layers = zip(launch.paths, call.bases, strict=True)
            arrays = tuple(outputs[path] if path in outputs else base(x) for path, base in layers)
        found = call.function(x, launch.rows, launch.table, *launch.slabs, *arrays)
        outputs.update(zip(launch.paths, found, strict=True))
    return outputs


def _fits(stack: Stack, dtype: mx.Dtype, linears: Mapping[str, nn.Module]) -> bool:
    """Whether the kernel computes this; found out once, since batches change often and layers do not."""
    if dtype not in stack.fits:
        stack.fits[dtype] = _computes(stack.layout, dtype, linears)
    return stack.fits[dtype]


def _computes(layout: GroupLayout, dtype: mx.Dtype, linears: Mapping[str, nn.Module]) -> bool:
    """Whether the kernel computes rows of this layout.

    It wants whole vectors of 16 bytes, outputs of the input's type, sums that fit into a block's own memory,
    and no bias, neither of a layer whose DoRA would scale it nor of the adapter's own.
    """
    if layout.has_bias or layout.size >= 1 << 31:
        return False
    if dtype not in TYPES or layout.dtype not in TYPES or dtype.size > layout.dtype.size:
        return False
    if layout.rank > LARGEST_RANK or any(
        compute_dtype(linears[p.path], dtype) != dtype for p in layout.projections
    ):
        return False
    width = 16 // layout.dtype.size
    if layout.in_size % width or any(p.out_size % width for p in layout.projections):
        return False
    return not layout.is_dora or all(linears[p.path].get("bias") is None for p in layout.projections)

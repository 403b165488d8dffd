"""Linear layers that serve rows with different adapters, and with none, in one forward.

    LoRA (arXiv:2106.09685)   y = W x + w·s·B A x
    DoRA (arXiv:2402.09353)   y = f ⊙ (W x + s·B A x) + bias,   f = m / ‖W + s·B A‖ row by row

The factors of all resident adapters lie in stacks, so that one product reads each row's own; projections that
read the same input share the product with A. The form is chosen by where and what is computed: one fused
kernel for decoding on CUDA; matrix products with gathered factors elsewhere there (its `gather_mm` has to be
compiled for half a minute first); one plain product where all rows have the same adapter; `gather_mm` for the
rest. Runs on the thread that owns the model; which rows use what comes from the Routing.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedModelError
from .fused import fused_outputs
from .layout import Layout
from .routing import BatchPlan, Pass, Routing
from .stacks import Stack

__all__ = ["MixedLinear", "ProjectionGroup"]

Steps = tuple[tuple[Pass, Stack], ...]


class MixedLinear(nn.Module):
    """A `nn.Linear` or `nn.QuantizedLinear` beside the factors of every resident adapter that adapts it.

    Forward: x (B, …, in) → (B, …, out), axis 0 being the rows of the batch. Without a plan, or where the
    batch's adapters do not touch this layer, it is the base layer's own forward.
    """

    def __init__(self, path: str, linear: nn.Module, group: ProjectionGroup) -> None:
        super().__init__()
        self.linear = linear
        self._path = path
        self._group = group

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was wrapped."""
        return self.linear

    def __call__(self, x: mx.array) -> mx.array:
        return self._group.forward(self._path, self.linear, x)


class ProjectionGroup:
    """Layers that read the same input: `layers` by path, and the stacks of the layouts that adapt them."""

    def __init__(self, routing: Routing) -> None:
        self.layers: dict[str, MixedLinear] = {}
        self.stacks: dict[Layout, Stack] = {}
        self._routing = routing

    def forward(self, path: str, linear: nn.Module, x: mx.array) -> mx.array:
        """The output of the layer at `path`, whose base is `linear`."""
        plan = self._routing.plan
        if plan is None:
            return linear(x)
        steps = plan.steps(self, self.stacks.get)
        if not steps:
            return linear(x)
        memo = plan.memo.get(self)
        # That the input is shared is what the names promise; here it is checked, by identity.
        if memo is None or memo[0] is not x:
            memo = plan.memo[self] = (x, self._begin(path, x, plan, steps))
        return memo[1].output(path, linear)

    def _begin(self, path: str, x: mx.array, plan: BatchPlan, steps: Steps) -> _Products | _Kernel:
        if x.shape[0] != plan.batch_size or x.ndim < 2:
            raise UnsupportedModelError(
                [f"{path} gets input of shape {x.shape}; its axis 0 must be the {plan.batch_size} rows"]
            )
        kernels = self._routing.kernels
        outputs = None if kernels is None else fused_outputs(x, self.layers, steps, kernels)
        if outputs is not None:
            return _Kernel(x, outputs)
        return _Products(x, steps, on_cuda=kernels is not None)


class _Kernel:
    """The outputs of all layers that the batch's adapters touch, from one kernel."""

    def __init__(self, x: mx.array, outputs: dict[str, mx.array]) -> None:
        self._x = x
        self._outputs = outputs

    def output(self, path: str, linear: nn.Module) -> mx.array:
        found = self._outputs.get(path)
        return linear(self._x) if found is None else found


class _Products:
    """The input times A, weighted, for each pass; each layer's B when it is asked for."""

    def __init__(self, x: mx.array, steps: Steps, on_cuda: bool) -> None:
        self._x = x
        self._steps = steps
        self._on_cuda = on_cuda
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        self._shrunk = [self._shrink(rows, one, stack) for one, stack in steps]

    def output(self, path: str, linear: nn.Module) -> mx.array:
        y = linear(self._x)
        shape = y.shape
        y = y.reshape(shape[0], -1, shape[-1])
        for (one, stack), h in zip(self._steps, self._shrunk, strict=True):
            if path in stack.layout.ranks:
                y = self._expand(y, h, one, stack, path, linear)
        return y.reshape(shape)

    def _gathers(self, dtype: mx.Dtype) -> bool:
        """Whether `gather_mm` can do it well: on a CPU it knows float32 alone."""
        return not self._on_cuda and (dtype == mx.float32 or mx.default_device().type == mx.DeviceType.gpu)

    def _shrink(self, x: mx.array, one: Pass, stack: Stack) -> mx.array:
        """w·s·A x of the rows concerned, (E, L, rank of all projections)."""
        a, layout = stack.a(), stack.layout
        x = x.astype(layout.dtype)
        if one.slot is not None:
            h = x @ a[one.slot].T
        elif self._gathers(layout.dtype):
            h = mx.gather_mm(x, a.swapaxes(-1, -2), lhs_indices=one.rows, rhs_indices=one.slots)
        else:
            h = (x if one.rows is None else x[one.rows]) @ a[one.slots].swapaxes(-1, -2)
        return h * one.weights(layout.dtype)

    def _expand(
        self, y: mx.array, h: mx.array, one: Pass, stack: Stack, path: str, linear: nn.Module
    ) -> mx.array:
        b, layout = stack.b(path), stack.layout
        if len(layout.projections) > 1:
            h = h[..., layout.ranks[path]]
        if one.slot is not None:
            delta = h @ b[one.slot]
        elif self._gathers(layout.dtype):
            delta = mx.gather_mm(h, b, rhs_indices=one.slots)
        else:
            delta = h @ b[one.slots]
        new = (y if one.rows is None else y[one.rows]) + delta.astype(y.dtype)
        if layout.is_dora:
            f = stack.factor(path)[one.slots][:, None, :].astype(y.dtype)
            bias = linear.get("bias")
            new = f * new if bias is None else f * (new - bias) + bias
        if one.select is None:
            return new
        return mx.take(mx.concatenate([y, new]), one.select, axis=0)

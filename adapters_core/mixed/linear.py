"""Linear layers that serve rows with different adapters, and with none, in one forward.

    LoRA (arXiv:2106.09685)   y = W x + w·s·B A x
    DoRA (arXiv:2402.09353)   y = f ⊙ (W x + s·B A x) + bias,   f = m / ‖W + s·B A‖ row by row

The factors of all resident adapters lie in stacks, so that one product reads each row's own; projections that
read the same input share the product with A. The form is chosen by where and what is computed: kernels of
our own for decoding on CUDA, else the products of `products.py`. Runs on the thread that owns the model;
which rows use what comes from the Routing.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from .kernel import Call, Kernels, plan_calls, run_calls
from .layout import Layout
from .plan import BatchPlan, Pass
from .products import Products
from .rounds import Round, rounds_of
from .routing import Routing
from .stacks import Stack

__all__ = ["MixedLinear", "ProjectionGroup", "Work"]


class MixedLinear(nn.Module):
    """A `nn.Linear` or `nn.QuantizedLinear` beside the factors of every resident adapter that adapts it.

    Forward: x (B, …, in) → (B, …, out), axis 0 being the rows of the batch, or x (B·L, in) → (B·L, out), row
    after row. Without a plan, or where the batch's adapters do not touch this layer, it is the base layer's
    own forward.
    """

    def __init__(self, path: str, linear: nn.Module, group: ProjectionGroup) -> None:
        super().__init__()
        self.linear = linear
        self._base = linear.__call__  # the look-up of a submodule costs, in every layer of every forward
        self._path = path
        self._group = group

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was wrapped."""
        return self.linear

    def __call__(self, x: mx.array) -> mx.array:
        plan = self._group.routing.plan
        if plan is None:
            return self._base(x)
        shared = plan.memo.get(self._group)
        # That the input is shared is what the names promise; here it is checked, by identity.
        if shared is None or shared[0] is not x:
            shared = plan.memo[self._group] = (x, self._group.begin(self._path, x, plan))
        work = shared[1]
        if isinstance(work, Products):
            return work.output(self._path, self.linear)
        done = work.get(self._path)
        return self._base(x) if done is None else done


class ProjectionGroup:
    """Layers that read the same input: `bases` by path, and the stacks of the layouts that adapt them."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.bases: dict[str, nn.Module] = {}
        self.stacks: dict[Layout, Stack] = {}

    def work(self, plan: BatchPlan) -> Work:
        """What the group does for a batch."""
        return plan.work(self, self._lay_out)

    def begin(self, path: str, x: mx.array, plan: BatchPlan) -> Products | dict[str, mx.array]:
        """What the layers of the group share for the input x: done outputs by path, or the first products.

        Raises:
            UnsupportedModelError: axis 0 of x is not the rows of the batch; `path` is the layer that got it.
        """
        work = plan.work(self, self._lay_out)
        if not work.products:
            return {}
        shape = x.shape
        has_rows = shape[0] == plan.batch_size and len(shape) >= 2
        if not has_rows and not (len(shape) == 2 and plan.is_flat(shape[0])):
            raise UnsupportedModelError([_strange(path, shape, plan.batch_size)])
        if len(shape) == 3 and shape[1] == 1 and self.routing.kernels is not None:
            calls = work.calls_for(x.dtype, plan, self.routing.kernels, self.bases)
            if calls is not None:
                return run_calls(x, calls)
        copies = self.routing.forms.copies(plan.batch_size, x.size // (plan.batch_size * x.shape[-1]))
        return Products(x, work.products, work.rounds_at, plan.batch_size, copies)

    def _lay_out(self, plan: BatchPlan) -> Work:
        found = ((one, self.stacks.get(one.layout)) for one in plan.passes)
        return Work(tuple((one, stack) for one, stack in found if stack is not None), plan.batch_size)


class Work:
    """What one group does for one batch: laid out once, used in every forward until the batch changes.

    `products` are the `steps` that linear layers take, which are all but those for look-ups alone;
    `lookups` are those of embeddings, all but those for a tied head alone.
    """

    def __init__(self, steps: tuple[tuple[Pass, Stack], ...], batch_size: int) -> None:
        self.steps = steps
        self._batch_size = batch_size
        self._rounds: dict[str, tuple[Round, ...]] = {}
        self.lookups = tuple(step for step in steps if not step[1].layout.head_only)
        self.products = tuple(step for step in steps if not step[1].layout.lookup_only)
        self._calls: dict[mx.Dtype, tuple[Call, ...] | None] = {}

    def rounds_at(self, path: str) -> tuple[Round, ...]:
        """The rounds of the `products` that the layer at `path` has a part in."""
        if path not in self._rounds:
            numbered = enumerate(self.products)
            own = [(number, step) for number, step in numbered if path in step[1].layout.ranks]
            self._rounds[path] = rounds_of(own, self._batch_size)
        return self._rounds[path]

    def calls_for(
        self, dtype: mx.Dtype, plan: BatchPlan, kernels: Kernels, bases: dict[str, nn.Module]
    ) -> tuple[Call, ...] | None:
        """The kernel calls for inputs of `dtype`; None where the kernel cannot compute them."""
        if dtype not in self._calls:
            self._calls[dtype] = plan_calls(self.products, plan, dtype, kernels, bases)
        return self._calls[dtype]


def _strange(path: str, shape: tuple[int, ...], batch_size: int) -> str:
    rows = f"the {batch_size} rows, or all their tokens in order"
    return f"{path} gets input of shape {shape}; its axis 0 must be {rows}"

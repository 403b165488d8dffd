"""Experts of a mixture that serve rows with different adapters, and with none, in one forward.

A switch layer sees tokens and, where there are many of them, sorted by expert, so that it cannot know which
row of the batch a token belongs to. Their common module can, and so it is wrapped as a whole: it routes not
to the expert alone but to a number that names expert and row, expert·B + row, which sorts by expert as
before; the switch layers take the number apart again. Runs on the thread that owns the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..errors import UnsupportedModelError
from ..layers.modules import ModuleKind, kind_of
from .expert_products import ExpertProducts, Routes
from .linear import ProjectionGroup
from .plan import BatchPlan
from .routing import Routing

__all__ = ["ExpertGroups", "MixedExperts", "routes_rows", "switch_layers"]


def routes_rows(experts: nn.Module) -> bool:
    """Whether `experts` can be wrapped: its indices go to its switch layers and nowhere else."""
    return type(experts) in (SwitchGLU, SwitchMLP)


def switch_layers(experts: nn.Module) -> dict[str, nn.Module]:
    """The switch layers right inside a common module of experts, by name."""
    found = {name: child for name, child in experts.items() if isinstance(child, nn.Module)}
    return {name: child for name, child in found.items() if kind_of(child) is ModuleKind.SWITCH}


class ExpertGroups:
    """The groups that the switch layers of one common module belong to.

    `names` are the groups' names by path; which groups there are changes as adapters come and go, and is
    looked up in `groups`, a bank's.
    """

    def __init__(
        self, routing: Routing, names: Mapping[str, str], groups: Mapping[str, ProjectionGroup]
    ) -> None:
        self.routing = routing
        self._names = dict(names)
        self._groups = groups

    def are_used(self, plan: BatchPlan) -> bool:
        """Whether an adapter of the batch touches any of the layers."""
        found = (self._groups.get(name) for name in self._names.values())
        return any(group is not None and group.work(plan).steps for group in found)

    def routes(self, numbers: mx.array, plan: BatchPlan) -> Routes:
        """The experts and rows that `numbers` name; taken apart once for layers that get the same array."""
        routes = plan.memo.get(self)
        if routes is None or routes.numbers is not numbers:
            size = plan.batch_size
            routes = plan.memo[self] = Routes(numbers, numbers // size, numbers % size)
        return routes

    def products(
        self, path: str, x: mx.array, routes: Routes, sorted_indices: bool, plan: BatchPlan
    ) -> ExpertProducts | None:
        """What the layer at `path` shares with others of its group for x; None if it adds nothing."""
        group = self._groups.get(self._names[path])
        steps = () if group is None else group.work(plan).steps
        if not steps:
            return None
        shared = plan.memo.get(group)
        if shared is None or shared.x is not x or shared.routes is not routes:
            shared = ExpertProducts(x, routes, steps, sorted_indices, self.routing.on_cuda)
            plan.memo[group] = shared
        return shared


class MixedExperts(nn.Module):
    """A `SwitchGLU` or `SwitchMLP` beside the factors of every resident adapter that adapts its experts.

    Forward: x (B, L, in), or (B·L, in) row after row, and indices (…, k) → (…, k, out). Without a plan, or
    where the batch's adapters do not touch these experts, it is the base's own forward.
    """

    experts: Any

    def __init__(self, path: str, experts: nn.Module, groups: ExpertGroups) -> None:
        super().__init__()
        self.experts = experts
        self._base = experts.__call__
        self._path = path
        self._groups = groups
        routed = copy.copy(experts)
        for name, child in switch_layers(experts).items():
            routed[name] = _MixedSwitch(f"{path}.{name}", child, groups)
        # Kept by its method, so that the model's tree does not have it.
        self._routed = routed.__call__

    def reverted(self) -> nn.Module:
        """The base module, the very one that was wrapped."""
        return self.experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        plan = self._groups.routing.plan
        if plan is None or not self._groups.are_used(plan):
            return self._base(x, indices)
        return self._routed(x, indices * plan.batch_size + self._rows(x, indices, plan))

    def _rows(self, x: mx.array, indices: mx.array, plan: BatchPlan) -> mx.array:
        """The row of the batch that each token belongs to, in a shape that goes with that of `indices`."""
        *lead, _ = x.shape
        rows = mx.arange(plan.batch_size, dtype=indices.dtype)
        if list(indices.shape[:-1]) == lead:
            if len(lead) == 2 and lead[0] == plan.batch_size:
                return rows[:, None, None]
            if len(lead) == 1 and plan.is_flat(lead[0]):
                return mx.repeat(rows, lead[0] // plan.batch_size)[:, None]
        raise UnsupportedModelError(
            [
                f"{self._path} gets input of shape {x.shape} and indices of shape {indices.shape}; expected "
                f"the {plan.batch_size} rows of the batch on axis 0 of both, or all their tokens in order"
            ]
        )


class _MixedSwitch(nn.Module):
    """A switch layer whose indices name expert and row; forward as `LoRASwitchLinear`'s."""

    linear: Any

    def __init__(self, path: str, linear: nn.Module, groups: ExpertGroups) -> None:
        super().__init__()
        self.linear = linear
        self._path = path
        self._groups = groups

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        plan = self._groups.routing.plan
        if plan is None:
            raise UnsupportedModelError([f"{self._path} is computed outside of its forward"])
        routes = self._groups.routes(indices, plan)
        y = self.linear(x, routes.experts, sorted_indices=sorted_indices)
        products = self._groups.products(self._path, x, routes, sorted_indices, plan)
        return y if products is None else products.added(self._path, y)

"""From what an adapter brings to modules to the rows that a bank keeps of it.

Reads modules and changes none; the rows are evaluated on the calling thread, which may be any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..layers.magnitudes import dora_factor
from ..layers.module_weights import ModuleWeights
from ..layers.modules import ModuleKind, compute_dtype, dense_weight, kind_of, weight_shape
from .layout import Factors, GroupLayout, Projection, bucket_rank, group_projections

__all__ = ["LaidOut", "float_dtype", "group_modules", "lay_out"]


@dataclass(frozen=True, slots=True)
class LaidOut:
    """An adapter's rows by group, evaluated; its deltas still have to be multiplied with `scale`."""

    groups: dict[str, GroupLayout]
    rows: dict[str, mx.array]
    scale: float


def lay_out(
    weights: Mapping[str, ModuleWeights], modules: Mapping[str, nn.Module], default: mx.Dtype
) -> LaidOut:
    """The rows of `weights` for the base `modules`, both by path; `default` is the model's own float type."""
    names = group_modules(modules)
    groups = {name: _group_layout(paths, weights, modules, default) for name, paths in names.items()}
    # A product with the scale less in each forward; in float32, what B loses by it does not show.
    scale = 1.0
    if any(group.dtype != mx.float32 for group in groups.values()):
        scale = max((one.scale for one in weights.values()), key=abs)
    rows = {
        name: groups[name].pack(
            {path: _factors(modules[path], weights[path], scale, default) for path in paths}
        )
        for name, paths in names.items()
    }
    mx.eval(rows)
    return LaidOut(groups, rows, scale)


def group_modules(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The paths of `modules` by the name of their group."""
    return group_projections({path: weight_shape(module)[-1] for path, module in modules.items()})


def float_dtype(model: nn.Module) -> mx.Dtype:
    """That of the model's first parameter that has one; float32 without any."""
    for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        if mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32


def _group_layout(
    paths: list[str],
    weights: Mapping[str, ModuleWeights],
    modules: Mapping[str, nn.Module],
    default: mx.Dtype,
) -> GroupLayout:
    """A dtype that holds the file's and the layers', and the ranks in their buckets."""
    dtypes = {compute_dtype(modules[path], default) for path in paths}
    dtypes |= {weights[path].lora_a.dtype for path in paths}
    dtype = reduce(_common_dtype, dtypes)
    projections = []
    for path in paths:
        out_size, in_size = weight_shape(modules[path])[-2:]
        projections.append(Projection(path, bucket_rank(weights[path].rank), in_size, out_size))
    experts = None
    if kind_of(modules[paths[0]]) is ModuleKind.SWITCH:
        experts = weight_shape(modules[paths[0]])[0]
        # Their products know no other type on a CPU, and a whole stack would be converted for each.
        dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else dtype
    return GroupLayout(
        tuple(projections),
        is_dora=weights[paths[0]].magnitude is not None,
        dtype=dtype,
        experts=experts,
        has_bias=any(weights[path].bias is not None for path in paths),
        lookup_only=any(weights[path].lookup_only for path in paths),
        by_feature=any(weights[path].by_feature for path in paths),
    )


def _common_dtype(one: mx.Dtype, other: mx.Dtype) -> mx.Dtype:
    """What MLX computes a sum of both in."""
    return (mx.zeros(1, one) + mx.zeros(1, other)).dtype


def _factors(module: nn.Module, weights: ModuleWeights, scale: float, default: mx.Dtype) -> Factors:
    """A and B such that `scale`·B A is the delta; for DoRA, m / ‖W + s·B A‖ as (out,), by feature as (in,).

    An embedding's are those of the linear layer that it is for a tied head.
    """
    match kind_of(module):
        case ModuleKind.EMBEDDING:
            a, b = weights.lora_b, weights.lora_a.T
        case ModuleKind.SWITCH:
            a, b = weights.lora_a, weights.lora_b.swapaxes(-1, -2)
        case _:
            a, b = weights.lora_a.T, weights.lora_b
    factor, bias = None, weights.bias
    if weights.magnitude is not None:
        base = dense_weight(module).astype(mx.float32)
        delta = (weights.scale * b.T.astype(mx.float32)) @ a.astype(mx.float32)
        norm = mx.linalg.norm(base + delta, axis=0 if weights.by_feature else 1)
        factor = dora_factor(weights.magnitude.astype(mx.float32), norm).astype(
            compute_dtype(module, default)
        )
    if weights.scale != scale:
        # In float32, whatever the file holds; the row's dtype rounds once, when it is packed.
        rest = weights.scale / scale
        b = b.astype(mx.float32) * rest
        bias = None if bias is None else bias.astype(mx.float32) * rest
    return Factors(a, b, factor, bias)

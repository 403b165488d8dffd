"""From what an adapter brings to modules to the rows that a bank keeps of it.

Reads modules and changes none; the rows are evaluated on the calling thread, which may be any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """An adapter's rows by group, evaluated; its deltas still have to be multiplied with `scale`.

    `problems` name the modules of which a row holds numbers that are not finite.
    """

    groups: dict[str, GroupLayout]
    rows: dict[str, mx.array]
    scale: float
    problems: list[str]


def lay_out(
    weights: Mapping[str, ModuleWeights], modules: Mapping[str, nn.Module], default: mx.Dtype
) -> LaidOut:
    """The rows of `weights` for the base `modules`, both by path; `default` is the model's own float type."""
    names = group_modules(modules)
    groups = {name: _group_layout(paths, weights, modules, default) for name, paths in names.items()}
    scale = max((one.scale for one in weights.values()), key=abs)
    for name, paths in names.items():
        if not all(_folds(weights[path], scale, groups[name].dtype) for path in paths):
            groups[name] = replace(groups[name], dtype=mx.float32)
    if all(group.dtype == mx.float32 for group in groups.values()):
        scale = 1.0  # a product with the scale less in each forward; what B loses by it does not show
    factors = {path: _factors(modules[path], weights[path], scale, default) for path in weights}
    rows = {name: groups[name].pack({path: factors[path] for path in paths}) for name, paths in names.items()}
    finite = {path: _finite(factors[path]) for path in factors}
    mx.eval(rows, finite)
    problems = [
        f"{path}: expected finite numbers, got NaN or infinite ones once the scale {weights[path].scale:g} "
        "and DoRA's norms are taken in"
        for path, is_finite in finite.items()
        if not is_finite.item()
    ]
    return LaidOut(groups, rows, scale, problems)


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
    found = (weights[path] for path in paths)
    dtypes |= {
        array.dtype for one in found for array in (one.lora_a, one.lora_b, one.bias) if array is not None
    }
    dtype = reduce(_common_dtype, dtypes)
    projections = []
    for path in paths:
        out_size, in_size = weight_shape(modules[path])[-2:]
        projections.append(Projection(path, bucket_rank(weights[path].rank), in_size, out_size))
    experts = None
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if kind_of(modules[paths[0]]) is ModuleKind.SWITCH:
        experts = weight_shape(modules[paths[0]])[0]
        # Their products know no other type on a CPU, and a whole stack would be converted for each.
        dtype = mx.float32 if on_cpu else dtype
    if dtype == mx.float16 and on_cpu:
        dtype = mx.float32  # as fast there, and x A as well as x A B may leave float16's range
    return GroupLayout(
        tuple(projections),
        is_dora=weights[paths[0]].magnitude is not None,
        dtype=dtype,
        experts=experts,
        has_bias=any(weights[path].bias is not None for path in paths),
        lookup_only=any(weights[path].lookup_only for path in paths),
        by_feature=any(weights[path].by_feature for path in paths),
        head_only=any(weights[path].head_only for path in paths),
    )


def _common_dtype(one: mx.Dtype, other: mx.Dtype) -> mx.Dtype:
    """What MLX computes a sum of both in."""
    return (mx.zeros(1, one) + mx.zeros(1, other)).dtype


def _folds(weights: ModuleWeights, scale: float, dtype: mx.Dtype) -> bool:
    """Whether B can be multiplied with what the module's own scale is of `scale`, and `dtype` loses nothing.

    Modules of one adapter may have scales that are far apart: then float16 holds neither end.
    """
    if dtype == mx.float32 or weights.scale == scale:
        return True
    folded = [
        _times(array, weights.scale / scale) for array in (weights.lora_b, weights.bias) if array is not None
    ]
    return all(mx.array_equal(array.astype(dtype).astype(mx.float32), array).item() for array in folded)


def _times(array: mx.array, factor: float) -> mx.array:
    """In float32, whatever the file holds; the row's dtype rounds once, when it is packed."""
    return array.astype(mx.float32) * factor


def _finite(factors: Factors) -> mx.array:
    """Whether all of `factors` but A, which is the file's own, is finite; not evaluated."""
    made = [array for array in (factors.b, factors.factor, factors.bias) if array is not None]
    return mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in made]))


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
        rest = weights.scale / scale
        b = _times(b, rest)
        bias = None if bias is None else _times(bias, rest)
    return Factors(a, b, factor, bias)

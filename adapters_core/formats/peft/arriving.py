"""What factors of a transformers weight are for the MLX modules in which it arrives, and the way back.

Row i of the MLX weight is fᵢ times row rᵢ of the transformers one. So are the rows of B A, and of a DoRA.

    W'ᵢ = fᵢ Wᵣ     B'ᵢ = fᵢ Bᵣ     m'ᵢ = |fᵢ| mᵣ          (of an embedding, A' in the place of B')

A bias of the adapter's own adds to the output, and a factor may be one of the input: the two cannot be told
apart, so that it is refused beside factors. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ...layers.module_weights import ModuleWeights
from ..adapter_files import scaled
from .arrivals import Arrival

__all__ = ["arrived", "arrived_tensors", "departed", "joined", "times"]

_MERGE = "merge the adapter into its base and serve that"


def arrived(weights: ModuleWeights, arrival: Arrival, *, is_embedding: bool) -> ModuleWeights | str:
    """`weights` of a transformers weight as those of its rows in `arrival`, or why there are none."""
    if arrival.is_plain:
        return weights
    factors = None if arrival.factors is None else mx.array(arrival.factors)
    rows = None if arrival.rows is None else mx.array(arrival.rows)
    if weights.bias is not None and factors is not None:
        return f"mlx-lm multiplies the weight on loading, and a bias (lora_bias) cannot follow; {_MERGE}"
    if weights.by_feature and (rows is not None or _one(arrival) is None):
        return f"mlx-lm changes rows of the weight on loading, and a DoRA by feature cannot follow; {_MERGE}"
    if weights.magnitude is not None and arrival.factors is not None and not arrival.factors.all():
        return "mlx-lm multiplies the weight by zero on loading, and a DoRA cannot follow"
    changed = weights.lora_a if is_embedding else weights.lora_b.T
    magnitude, bias = weights.magnitude, weights.bias
    if rows is not None:
        changed = changed[rows]
        magnitude = None if magnitude is None else magnitude[rows]
        bias = None if bias is None else bias[rows]
    if factors is not None:
        changed = times(changed, factors[:, None])
        if magnitude is not None:
            own = mx.abs(factors)
            magnitude = times(magnitude, own[0] if weights.by_feature else own)
    changed = mx.contiguous(changed if is_embedding else changed.T)
    if is_embedding:
        return replace(weights, lora_a=changed, magnitude=magnitude, bias=bias)
    return replace(weights, lora_b=changed, magnitude=magnitude, bias=bias)


def joined(parts: Sequence[tuple[Arrival, ModuleWeights]], rows: int) -> ModuleWeights | str:
    """The `parts` of one linear layer of so many `rows` as one LoRA of it: A side by side, B in blocks."""
    if len(parts) == 1 and parts[0][1].lora_b.shape[1] == rows:
        return parts[0][1]
    parts = sorted(parts, key=lambda part: part[0].start)
    is_full = sum(weights.lora_b.shape[1] for _, weights in parts) == rows
    if any(weights.magnitude is not None for _, weights in parts) and not is_full:
        return "mlx-lm joins it with others on loading, and a DoRA of some alone cannot follow"
    if any(weights.bias is not None for _, weights in parts):
        return f"mlx-lm joins it with others on loading, and a bias (lora_bias) cannot follow; {_MERGE}"
    scale = next((weights.scale for _, weights in parts if weights.scale), 0.0)
    pairs = [scaled(weights, scale) for _, weights in parts]
    blocks = [
        mx.pad(b, [(0, 0), (arrival.start, rows - arrival.start - b.shape[1])])
        for (_, b), (arrival, _) in zip(pairs, parts, strict=True)
    ]
    magnitudes = [weights.magnitude for _, weights in parts if weights.magnitude is not None]
    magnitude = mx.concatenate(magnitudes) if magnitudes else None
    return ModuleWeights(
        mx.concatenate([a for a, _ in pairs], axis=1), mx.concatenate(blocks), magnitude, scale
    )


def arrived_tensors(tensor: mx.array, arrival: Arrival) -> list[mx.array]:
    """A whole parameter after loading, as it is if the checkpoint has it in its own, or in another dtype.

    The first is the most exact one.
    """
    if arrival.is_plain:
        return [tensor]
    rows = None if arrival.rows is None else mx.array(arrival.rows)
    tensor = tensor if rows is None else tensor[rows]
    found = []
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        made = tensor.astype(dtype)
        if arrival.factors is not None:
            made = made * mx.array(arrival.factors)[:, None].astype(dtype)
        found.append(made + mx.array(arrival.added, dtype))
    return found


def departed(weights: ModuleWeights, arrival: Arrival, *, is_embedding: bool) -> ModuleWeights | str:
    """What `arrived` makes `weights` of, if one weight arrives as the whole module; or why there is none."""
    if arrival.is_plain:
        return weights
    rows, factors = arrival.rows, arrival.factors
    if factors is not None and not factors.all():
        return "mlx-lm multiplies the weight by zero on loading"
    back = None if rows is None else np.argsort(rows)
    if factors is not None:
        factors = 1 / (factors if back is None else factors[back])
    return arrived(weights, replace(arrival, rows=back, factors=factors), is_embedding=is_embedding)


def times(tensor: mx.array, factors: mx.array) -> mx.array:
    """`tensor` times `factors`: in its dtype where that is exact, else in float32."""
    wide = tensor.astype(mx.float32) * factors
    narrow = wide.astype(tensor.dtype)
    return narrow if mx.array_equal(narrow.astype(mx.float32), wide).item() else wide


def _one(arrival: Arrival) -> float | None:
    """The factor that all rows have, None if they differ."""
    if arrival.factors is None:
        return 1.0
    return float(arrival.factors[0]) if (arrival.factors == arrival.factors[0]).all() else None

"""Random adapters by path, and what their modules add to a weight, in float64 to judge by."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from adapters_core.layers.module_weights import ModuleWeights


def linear(seed: int, shape: tuple[int, int] = (20, 16), rank: int = 4, scale: float = 2.0) -> ModuleWeights:
    """Random factors for a linear layer or an embedding of `shape` (in, out)."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, (shape[0], rank)), rng.normal(0, 1, (rank, shape[1]))
    return ModuleWeights(mx.array(a, mx.float32), mx.array(b, mx.float32), None, scale)


def switch(seed: int, experts: int = 3, rank: int = 2, scale: float = 0.5) -> ModuleWeights:
    """Random factors for the experts of a layer (in 12, out 10)."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, (experts, rank, 12)), rng.normal(0, 1, (experts, 10, rank))
    return ModuleWeights(mx.array(a, mx.float32), mx.array(b, mx.float32), None, scale)


def delta(module: ModuleWeights) -> np.ndarray:
    """s·A B as (in, out), or s·B A as (experts, out, in)."""
    a, b = (
        np.array(factor.astype(mx.float32), dtype=np.float64) for factor in (module.lora_a, module.lora_b)
    )
    return module.scale * (b @ a if a.ndim == 3 else a @ b)

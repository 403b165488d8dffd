"""Random adapters for any model, with an effect that leaves answers text: for checks and measurements.

Reads the model and changes nothing; MLX's global random state is left alone. Runs on any thread.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from .config import AdapterConfig, FineTuneType
from .layers.modules import compute_dtype, dense_weight, factor_shapes, weight_shape
from .layers.targets import resolve_targets

__all__ = ["draw_tensors"]

_RELATIVE_SIZE = 0.1  # root mean square of the delta over that of the weight


def draw_tensors(model: nn.Module, config: AdapterConfig, seed: int) -> dict[str, mx.array]:
    """The tensors of an adapter with `config` for `model`, with mlx-lm's names and shapes; evaluated.

    A is uniform in ±1/√in, as training begins with; B is normal, of the variance that gives scale·A·B a tenth
    of the weight's size; DoRA's magnitudes are the norms of W's rows times 0.8 to 1.25. The factors have the
    dtype that the base computes in, the magnitudes float32.

    Raises: InvalidAdapterError, UnsupportedModelError: as `resolve_targets`.
    """
    parameters, key = config.lora_parameters, mx.random.key(seed)
    is_dora = config.fine_tune_type is FineTuneType.DORA
    tensors: dict[str, mx.array] = {}
    for path, module in resolve_targets(model, config).items():
        weight = dense_weight(module).astype(mx.float32)
        bound = 1 / math.sqrt(weight_shape(module)[-1])
        size = _RELATIVE_SIZE * mx.sqrt(mx.mean(weight * weight))
        spread = size * math.sqrt(3) / (abs(parameters.scale or 1.0) * math.sqrt(parameters.rank) * bound)
        for name, shape in factor_shapes(module, parameters.rank, is_dora).items():
            key, mine = mx.random.split(key)
            if name == "m":
                drawn = mx.linalg.norm(weight, axis=-1) * mx.random.uniform(0.8, 1.25, shape, key=mine)
            elif name.startswith("lora_a"):
                drawn = mx.random.uniform(-bound, bound, shape, key=mine).astype(compute_dtype(module))
            else:
                drawn = (spread * mx.random.normal(shape, key=mine)).astype(compute_dtype(module))
            tensors[f"{path}.{name}"] = drawn
        # Module by module, so that the float32 weights of a whole model never exist at once.
        mx.eval([tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")])
    return tensors

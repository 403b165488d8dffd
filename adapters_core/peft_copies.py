"""Weights of the base that a PEFT file brings along.

PEFT saves embeddings and heads whole when they are adapted, or when it finds that the vocabulary was resized.
A copy of the base's own weight says nothing; another weight would be a change of the base. Changes nothing.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .builders import quantized_like
from .modules import dense_weight, is_quantized, weight_shape

__all__ = ["copy_problem"]

_TOLERANCE = 0.02


def copy_problem(name: str, tensor: mx.array, module: nn.Module | None) -> str | None:
    """Why the tensor `name` is not the weight of the base's `module`; None if it is.

    On a quantised base, the tensor is quantised as the base is before they are compared.
    """
    if module is None:
        return f"tensor {name}: not expected: a weight of the base, of a module that the model does not have"
    if tensor.shape != weight_shape(module):
        return (
            f"tensor {name}: not expected: a weight of the base of shape {tensor.shape}, where the base has "
            f"{weight_shape(module)}; all rows of a batch share the base"
        )
    if _is_own(tensor, module):
        return None
    return (
        f"tensor {name}: not expected: a weight that is not the base's; it was trained or resized, or "
        "belongs to another base. All rows of a batch share the base"
    )


def _is_own(tensor: mx.array, module: nn.Module) -> bool:
    own = dense_weight(module)
    if not is_quantized(module):
        equal = mx.all(tensor.astype(own.dtype) == own) | mx.all(own.astype(tensor.dtype) == tensor)
        return bool(equal.item())
    again = dense_weight(quantized_like(module, tensor)).astype(mx.float32)
    difference = mx.linalg.norm(again - own.astype(mx.float32))
    return bool((difference <= _TOLERANCE * mx.linalg.norm(own.astype(mx.float32))).item())

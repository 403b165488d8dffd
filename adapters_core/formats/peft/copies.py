"""Weights of the base that a PEFT file brings along.

PEFT saves embeddings and heads whole when they are adapted, or when it finds that the vocabulary was resized.
A copy of the base's own weight says nothing; another weight would be a change of the base. Changes nothing.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ...layers.builders import quantized_like
from ...layers.modules import ModuleKind, dense_weight, is_quantized, kind_of, weight_shape
from ...layers.targets import named_base_modules

__all__ = ["copies_bytes", "copy_problem"]

# Of what quantising a row changes in it: codes flip where a base was quantised from another dtype.
_TOLERANCE = 0.5
_MAX_COPIES = 2  # the embedding's and the head's


def copy_problem(name: str, tensor: mx.array, module: nn.Module | None) -> str | None:
    """Why the tensor `name` is not the weight of the base's `module`; None if it is.

    On a quantised base, the tensor is quantised as the base is before they are compared; no row may differ by
    more than half of what quantising it changes.
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


def copies_bytes(model: nn.Module) -> int:
    """What the copies that a file may bring along take at most: of embedding and head, in float32."""
    embeddings = (
        module for _, module in named_base_modules(model) if kind_of(module) is ModuleKind.EMBEDDING
    )
    largest = max((math.prod(weight_shape(module)) for module in embeddings), default=0)
    return _MAX_COPIES * largest * mx.float32.size


def _is_own(tensor: mx.array, module: nn.Module) -> bool:
    own = dense_weight(module)
    if not is_quantized(module):
        equal = mx.all(tensor.astype(own.dtype) == own) | mx.all(own.astype(tensor.dtype) == tensor)
        return bool(equal.item())
    # Row by row: the rows of two new tokens are lost in the norm of a whole vocabulary.
    again = dense_weight(quantized_like(module, tensor)).astype(mx.float32)
    wide, own = tensor.astype(mx.float32), own.astype(mx.float32)
    difference = mx.linalg.norm(again - own, axis=-1)
    rounding = mx.linalg.norm(wide - again, axis=-1)
    equal = mx.all(wide.astype(tensor.dtype) == own.astype(tensor.dtype), axis=-1)
    return bool(mx.all(equal | (difference <= _TOLERANCE * rounding)).item())

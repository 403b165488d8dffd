"""How weights of the base that a PEFT file brings along compare with the base's own, row by row.

PEFT saves embeddings and heads whole when they are adapted, or when it finds that the vocabulary was resized,
and any module that was trained whole (modules_to_save). Changes nothing.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ...layers.builders import quantized_like
from ...layers.modules import ModuleKind, dense_weight, is_quantized, kind_of, weight_shape
from ...layers.targets import named_base_modules

__all__ = ["changed_rows", "copies_bytes", "is_copy"]

# Of what quantising a row changes in it: codes flip where a base was quantised from another dtype.
_TOLERANCE = 0.5
_MAX_COPIES = 2  # the embedding's and the head's


def changed_rows(tensor: mx.array, module: nn.Module) -> list[int]:
    """The rows of `tensor`, of the shape of the module's weight, that are not those of the base's `module`.

    A weight that is a vector is one row. Rows are equal if one is the other in its dtype. On a quantised
    base, the tensor is quantised as the base is before they are compared; a row that differs by more than
    half of what quantising it changes is another one.
    """
    own = dense_weight(module)
    equal = _equal_rows(tensor, own)
    if is_quantized(module):
        # Row by row: the rows of two new tokens are lost in the norm of a whole vocabulary.
        again = dense_weight(quantized_like(module, tensor)).astype(mx.float32)
        wide, own = tensor.astype(mx.float32), own.astype(mx.float32)
        difference = mx.linalg.norm(again - own, axis=-1)
        rounding = mx.linalg.norm(wide - again, axis=-1)
        equal = equal | (difference <= _TOLERANCE * rounding).reshape(-1)
    flags = equal.tolist()
    return [row for row, is_equal in enumerate(flags if isinstance(flags, list) else [flags]) if not is_equal]


def is_copy(tensor: mx.array, own: mx.array | None) -> bool:
    """Whether `tensor` is the vector `own` of the base, in either's dtype."""
    return own is not None and own.shape == tensor.shape and bool(_equal_rows(tensor, own).item())


def copies_bytes(model: nn.Module) -> int:
    """What the copies that a file may bring along take at most: of embedding and head, in float32."""
    embeddings = (
        module for _, module in named_base_modules(model) if kind_of(module) is ModuleKind.EMBEDDING
    )
    largest = max((math.prod(weight_shape(module)) for module in embeddings), default=0)
    return _MAX_COPIES * largest * mx.float32.size


def _equal_rows(tensor: mx.array, own: mx.array) -> mx.array:
    left, right = (array.reshape(-1, array.shape[-1]) for array in (tensor, own))
    narrow = mx.all(left.astype(right.dtype) == right, axis=-1)
    return narrow | mx.all(right.astype(left.dtype) == left, axis=-1)

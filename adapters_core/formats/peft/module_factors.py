"""What the factors of a PEFT file bring to one linear layer or embedding: leaves, shapes, orientation.

One set of rules for a file beside a model and for one by itself: without a model, the factors say the sizes
of the weight. Names are those of the transformers model. Pure functions.
"""

from __future__ import annotations

import mlx.core as mx

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from .config import PeftConfig
from .factors import Factors, Shape
from .names import Leaf, is_head
from .targets import is_target, rank_and_scale

__all__ = ["factor_sizes", "has_embedding_factors", "left_out", "module_weights"]

_EMBEDDING = (Leaf.EMBEDDING_A, Leaf.EMBEDDING_B)
_LINEAR = (Leaf.A, Leaf.B)
_TARGETING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
)
_MAX_SHOWN = 200


def has_embedding_factors(factors: Factors) -> bool:
    """Whether the file has these factors as an embedding's."""
    return not factors.tensors.keys().isdisjoint(_EMBEDDING)


def factor_sizes(factors: Factors) -> tuple[int | None, int | None, int | None]:
    """Inputs, outputs and rank of a plain pair of factors; None where they do not say."""
    a, b = (factors.tensors.get(leaf) for leaf in _LINEAR)
    if factors.depth or a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return None, None, None
    return a.shape[1], b.shape[0], a.shape[0] if a.shape[0] == b.shape[1] else None


def left_out(config: PeftConfig, factors: Factors, *, is_linear: bool) -> list[str]:
    """A problem for each tensor if the config does not adapt the module."""
    if is_target(config.fields, factors.path, is_linear=is_linear, is_head=is_head(factors.path)):
        return []
    values = {name: getattr(config.fields, name) for name in _TARGETING}
    shown = ", ".join(f"{name} {value!r}" for name, value in values.items() if value)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
    return factors.refused(f"{CONFIG_FILE} leaves module {factors.path} out ({shown})")


def module_weights(
    config: PeftConfig,
    factors: Factors,
    *,
    is_embedding: bool,
    shape: Shape | None = None,
    name: str | None = None,
) -> tuple[ModuleWeights | None, list[str]]:
    """The weights for a base weight of `shape` (rows, columns), or why there are none.

    Factors are transposed because the format says so, whatever their shapes. DoRA has a magnitude for each
    output of a linear layer, and for each feature of an embedding. `name` is whose rank and alpha it has, the
    module's if left out.
    """
    if is_embedding and config.fields.lora_bias:
        return None, factors.refused("PEFT has no bias (lora_bias) for embeddings")
    rank, scale = rank_and_scale(config, name or factors.path)
    leaves = _EMBEDDING if is_embedding else _LINEAR
    if shape is None:
        without = [leaf for leaf in leaves if leaf not in factors.tensors or factors.tensors[leaf].ndim != 2]
        if without:
            path = factors.path
            return None, [f"tensor {path}.{leaf}: expected a matrix, the file has none" for leaf in without]
        inputs, outputs = factors.tensors[leaves[0]].shape[1], factors.tensors[leaves[1]].shape[0]
    else:
        inputs, outputs = shape if is_embedding else reversed(shape)
    expected: dict[Leaf, Shape] = {leaves[0]: (rank, inputs), leaves[1]: (outputs, rank)}
    if config.fields.use_dora:
        expected[Leaf.MAGNITUDE] = (outputs,)
    if config.fields.lora_bias:
        expected[Leaf.BIAS] = (outputs,)
    if problems := factors.problems(expected, rank):
        return None, problems
    tensors = factors.tensors
    weights = ModuleWeights(
        mx.contiguous(tensors[leaves[0]].T),
        mx.contiguous(tensors[leaves[1]].T),
        tensors.get(Leaf.MAGNITUDE),
        scale,
        tensors.get(Leaf.BIAS),
        by_feature=is_embedding and config.fields.use_dora,
    )
    return weights, []

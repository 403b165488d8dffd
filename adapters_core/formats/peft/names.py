"""The names of tensors in a PEFT file: which module, which of its factors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight      with an adapter's name
    base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight        a nested parameter

PEFT drops the adapter's name when it saves; files that were written in other ways keep it. Paths are those
of the transformers model; `paths` finds their places in an MLX model. Knows no tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "HEADS",
    "Leaf",
    "TensorName",
    "WholeName",
    "is_head",
    "is_input_embedding",
    "is_training_buffer",
    "not_a_factor",
    "parse_name",
    "whole_name",
]

HEADS = ("lm_head", "embed_out")
_INPUT_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "token_embeddings",
    "embeddings",
)

_PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<path>.+?)"
    r"\.(?:(?P<factor>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r"|(?P<tokens>token_adapter\.trainable_tokens_delta)(?:\.[^.]+)?)"
)
_NESTED = ".base_layer"
_WHOLE = re.compile(
    r"(?P<path>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?|\.(?P<original>original_module))?"
    r"\.(?P<parameter>weight|bias)"
)
# Buffers of training methods whose forward is plain LoRA's.
_TRAINING_BUFFER = re.compile(r".+\.(lora_velora_\w+|lora_monteclora_sampler)(\..+)?")


class Leaf(StrEnum):
    """What a tensor is to its module."""

    A = "lora_A"
    B = "lora_B"
    BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class TensorName:
    """`depth` counts the wrappers inside of which the factor lies, for parameters of one module."""

    path: str
    leaf: Leaf
    depth: int = 0


@dataclass(frozen=True, slots=True)
class WholeName:
    """A weight or bias of a module of the base itself: a copy, or what was trained in its place.

    `is_original` if the file says that it is the base's own, beside what was trained.
    """

    path: str
    parameter: str
    is_original: bool = False


def is_head(path: str) -> bool:
    """Whether the module at `path` is named as a model's head is."""
    return path.rpartition(".")[2] in HEADS


def is_input_embedding(path: str) -> bool:
    """Whether the module at `path` is named as the embedding of the tokens is."""
    return path.rpartition(".")[2] in _INPUT_EMBEDDINGS


def parse_name(name: str) -> TensorName | None:
    """What the tensor `name` is, or None if it is no factor of an adapter."""
    found = _NAME.fullmatch(name.removeprefix(_PREFIX))
    if found is None:
        return None
    if found["kind"] == "bias" and found["factor"] == "lora_A":
        return None
    leaf = Leaf(found["factor"] or found["embedding"] or found["tokens"] or Leaf.MAGNITUDE)
    if found["kind"] == "bias":
        leaf = Leaf.BIAS
    path, depth = found["path"], 0
    while path.endswith(_NESTED):
        path, depth = path.removesuffix(_NESTED), depth + 1
    return TensorName(path, leaf, depth)


def is_training_buffer(name: str) -> bool:
    """Whether `name` belongs to a method that differs from LoRA in training alone."""
    return _TRAINING_BUFFER.fullmatch(name) is not None


def whole_name(name: str) -> WholeName | None:
    """The module whose own weight or bias `name` is, else None.

    PEFT saves targeted embeddings with their base, and modules that were trained whole (modules_to_save).
    """
    found = _WHOLE.fullmatch(name.removeprefix(_PREFIX))
    if found is None or "lora_" in name:
        return None
    return WholeName(found["path"], found["parameter"], found["original"] is not None)


def not_a_factor(name: str) -> str:
    """Why a tensor that is neither a factor nor a weight of the base is not wanted."""
    if ".lora_diag" in name:
        return "singular values of KaSA, which is not supported"
    return "not the name of an adapter's tensor (lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, …)"

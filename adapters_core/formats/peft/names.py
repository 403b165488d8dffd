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
    "base_copy_path",
    "is_head",
    "is_input_embedding",
    "is_training_buffer",
    "not_a_factor",
    "parse_name",
]

HEADS = ("lm_head", "embed_out")
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")

_PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<path>.+?)"
    r"\.(?:(?P<factor>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r"|(?P<tokens>token_adapter\.trainable_tokens_delta)(?:\.[^.]+)?)"
)
_NESTED = ".base_layer"
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


def base_copy_path(name: str) -> str | None:
    """The module whose own weight `name` is (PEFT saves targeted embeddings with their base), else None."""
    path = name.removeprefix(_PREFIX)
    for suffix in (".base_layer.weight", ".weight"):
        if path.endswith(suffix):
            return path.removesuffix(suffix)
    return None


def not_a_factor(name: str) -> str | None:
    """Why a tensor that is no factor is not wanted; None for what may be a copy of a base's weight."""
    if ".modules_to_save." in name or ".original_module." in name:
        return "weights of a whole module (modules_to_save), which all rows of a batch share"
    if name.endswith(".bias"):
        return 'a bias of the base that was trained (bias is "all" or "lora_only"), which all rows share'
    if ".lora_diag" in name:
        return "singular values of KaSA, which is not supported"
    if "lora_" not in name and base_copy_path(name) is not None:
        return None
    return "not the name of an adapter's tensor (lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, …)"

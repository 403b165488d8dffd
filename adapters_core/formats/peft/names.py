"""The names of tensors in a PEFT file: which module, which of its factors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight      with an adapter's name
    base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight        a nested parameter

PEFT drops the adapter's name when it saves; files that were written in other ways keep it, or parts of what a
model was wrapped in (torch.compile, DDP, FSDP, activation checkpoints), which name nothing. Paths are those
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
    "unwrapped",
    "unwrapped_pattern",
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
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_offload_wrapped_module",
    }
)
_OUTER_WRAPPER = "module"  # DDP's and DeepSpeed's, around the whole model
_OUTER_PATTERN = re.compile(rf"^(\^?)(?:{_OUTER_WRAPPER}\\?\.)+")
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


def unwrapped(name: str) -> str:
    """`name`, of a tensor or a module, without the parts of what the model was wrapped in."""
    if not any(part in name for part in (*_WRAPPERS, f"{_OUTER_WRAPPER}.")):
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == _OUTER_WRAPPER and len(parts) > 1:
        del parts[0]
    if parts[:2] == _PREFIX.split(".")[:2]:
        while parts[2:3] == [_OUTER_WRAPPER]:
            del parts[2]
    return ".".join(parts)


def unwrapped_pattern(pattern: str) -> str:
    """A regular expression for names, for those that `unwrapped` gives."""
    for part in _WRAPPERS:
        pattern = pattern.replace(rf"{part}\.", "").replace(f"{part}.", "")
    return _OUTER_PATTERN.sub(r"\1", pattern)


def is_head(path: str) -> bool:
    """Whether the module at `path` is named as a model's head is."""
    return path.rpartition(".")[2] in HEADS


def is_input_embedding(path: str) -> bool:
    """Whether the module at `path` is named as the embedding of the tokens is."""
    return path.rpartition(".")[2] in _INPUT_EMBEDDINGS


def parse_name(name: str) -> TensorName | None:
    """What the tensor `name` is, or None if it is no factor of an adapter."""
    found = _NAME.fullmatch(_bare(name))
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
    found = _WHOLE.fullmatch(_bare(name))
    if found is None or "lora_" in name:
        return None
    return WholeName(found["path"], found["parameter"], found["original"] is not None)


def _bare(name: str) -> str:
    return unwrapped(name).removeprefix(_PREFIX)


def not_a_factor(name: str) -> str:
    """Why a tensor that is neither a factor nor a weight of the base is not wanted."""
    if ".lora_diag" in name:
        return "singular values of KaSA, which is not supported"
    return "not the name of an adapter's tensor (lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, …)"

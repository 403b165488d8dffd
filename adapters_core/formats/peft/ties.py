"""Which embedding is the head as well, and whether PEFT gives a head what it gives the embedding.

As in PEFT 0.21: `_check_tied_modules` (peft/tuners/tuners_utils.py), which goes by names alone, and only by
those of `EMBEDDING_LAYER_NAMES`. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.nn as nn

from ...layers.modules import ModuleKind, kind_of, weight_shape
from .config import PeftFields
from .names import is_head, is_input_embedding

__all__ = ["TIED_NAMES", "saved_are_tied", "targets_are_tied", "tied_embedding"]

# PEFT's EMBEDDING_LAYER_NAMES.
TIED_NAMES = ("embed_tokens", "lm_head")
_IN_A_LAYER = re.compile(r"\.\d+\.")


def tied_embedding(modules: Mapping[str, nn.Module]) -> str | None:
    """The path among `modules` of the embedding of the tokens if it is the head as well, else None.

    A head of the model's own is named as one, or lies outside of the layers and has the embedding's sizes.
    """
    outside = {path: module for path, module in modules.items() if not _IN_A_LAYER.search(path)}
    embeddings = [path for path, module in outside.items() if kind_of(module) is ModuleKind.EMBEDDING]
    # Positions, and tables of single layers, have other names; where no name is known, there is one alone.
    tokens = next((path for path in embeddings if is_input_embedding(path)), None)
    if tokens is None and len(embeddings) == 1:
        tokens = embeddings[0]
    if tokens is None:
        return None
    sizes = weight_shape(outside[tokens])
    heads = (
        path
        for path, module in outside.items()
        if kind_of(module) is ModuleKind.LINEAR and (is_head(path) or weight_shape(module) == sizes)
    )
    return tokens if next(heads, None) is None else None


def saved_are_tied(fields: PeftFields) -> bool:
    """Whether the head has the weight of an embedding that is saved whole."""
    return bool(fields.ensure_weight_tying) and _has_tied_name(fields.modules_to_save or ())


def targets_are_tied(fields: PeftFields) -> bool:
    """Whether the head has the factors of an embedding that is a target: if either is named as PEFT asks.

    An expression has to match the bare name; what is saved whole goes before what is a target.
    """
    if not fields.ensure_weight_tying or saved_are_tied(fields):
        return False
    if fields.target_pattern is not None:
        return any(fields.target_pattern.fullmatch(name) is not None for name in TIED_NAMES)
    return _has_tied_name(fields.target_names)


def _has_tied_name(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in TIED_NAMES for name in names)

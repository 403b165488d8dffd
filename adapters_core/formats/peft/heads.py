"""Which embedding of a model is its head as well. Reads modules and changes none."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.nn as nn

from ...layers.modules import ModuleKind, kind_of, weight_shape
from .names import is_head, is_input_embedding

__all__ = ["tied_embedding"]

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

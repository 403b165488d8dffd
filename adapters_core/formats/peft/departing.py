"""What transformers calls the modules of an MLX model, and what an adapter of them is there.

`places` the other way round: names from a table, and values as loading would give them back. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn

from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, weight_shape
from ...layers.targets import module_at
from .arriving import departed
from .paths import transformers_name
from .places import Places

__all__ = ["departed_weights"]


def departed_weights(
    model: nn.Module, weights: Mapping[str, ModuleWeights]
) -> tuple[dict[str, tuple[str, ModuleWeights]], list[str]]:
    """The transformers module of each path, with its name and weights, and why others have none.

    Experts keep their paths: their layout is that of parameters (`expert_writing`).
    """
    model_type = str(getattr(model, "model_type", ""))
    modules = {path: module_at(model, path) for path in weights}
    names = {path: transformers_name(model_type, path) for path in weights if weights[path].lora_b.ndim == 2}
    places = Places(model, {name: weight_shape(modules[path])[0] for path, name in names.items()})
    found: dict[str, tuple[str, ModuleWeights]] = {}
    problems: list[str] = []
    for path, own in weights.items():
        if path not in names:
            found[path] = path, own
            continue
        name = names[path]
        where = places.of(name)
        if len(where) != 1 or where[0].module != path:
            reason = places.reason(name) or "mlx-lm makes other modules of it on loading"
            problems.append(f"module {path}: {reason}; write it in mlx-lm's format")
            continue
        is_embedding = kind_of(modules[path]) is ModuleKind.EMBEDDING
        back = departed(own, where[0], is_embedding=is_embedding)
        if isinstance(back, str):
            problems.append(f"module {path}: {back}; write it in mlx-lm's format")
        else:
            found[path] = name, back
    return found, problems

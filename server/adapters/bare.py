"""A module tree, copied, without what stands in for its base modules. Runs on the thread of the model."""

from __future__ import annotations

import copy
from typing import Any

import mlx.nn as nn

from adapters_core.layers.targets import Wrapper

__all__ = ["bare_copy"]


def bare_copy(model: nn.Module) -> Any:
    """A copy of the module tree that shares all arrays, with what stands in for base modules taken off.

    A module that hangs in several places does so in the copy too. Other threads may read it, whatever
    becomes of the model.
    """
    return _copied(model, {})


def _copied(model: Any, copies: dict[int, Any]) -> Any:
    if isinstance(model, list):
        return [_copied(child, copies) for child in model]
    if isinstance(model, tuple):
        return tuple(_copied(child, copies) for child in model)
    if not isinstance(model, dict):
        return model
    if isinstance(model, Wrapper):
        model = model.reverted()
    if id(model) in copies:
        return copies[id(model)]
    twin = copies[id(model)] = copy.copy(model)
    for key, child in model.items():
        twin[key] = _copied(child, copies)
    return twin

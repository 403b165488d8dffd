"""Runs a model's `sanitize`, with which mlx-lm takes a checkpoint's weights in, on stand-ins for them.

The model stays as it is: `sanitize` gets a copy of its tree of modules, and no array of its own, since some
multiply what they are given in place. Runs on any thread; nothing large is computed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from itertools import count
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...layers.modules import is_quantized, kind_of, weight_shape
from ...layers.targets import is_wrapper, named_base_modules

__all__ = ["Weights", "checkpoint_of", "sanitized"]

Weights = dict[str, mx.array]
_MAX_ASKED = 1000
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_QUANTIZATION = frozenset({"scales", "biases", "global_scale"})


def checkpoint_of(model: nn.Module) -> Weights:
    """Stand-ins for the parameters of `model`, as a checkpoint that nobody has converted would have them.

    Matrices are dense zeros that take no memory; convolutions have their inputs before their width.
    """
    weights: Weights = {}
    for path, module in named_base_modules(model):
        for name, value in module.items():
            if not isinstance(value, mx.array) or name.startswith("_"):
                continue
            if name in _QUANTIZATION and is_quantized(module):
                continue
            if name == "weight" and kind_of(module) is not None:
                value = mx.broadcast_to(mx.zeros(()), weight_shape(module))
            elif name == "weight" and isinstance(module, nn.Conv1d):
                value = value.swapaxes(1, 2)
            weights[f"{path}.{name}" if path else name] = value
    return weights


def sanitized(
    model: nn.Module, markers: Weights, rest: Mapping[str, mx.array], checkpoint: Weights
) -> dict[str, tuple[mx.array, str | None]]:
    """What `sanitize` makes of `markers` beside the `rest`, and of what it asks for in `checkpoint`.

    With each tensor, the name of the marker whose very object it is: its values may be others.

    Raises:
        Exception: what `sanitize` raises.
    """
    asked: Weights = {}
    for tries in count():
        weights = {name: mx.stop_gradient(own) for name, own in {**rest, **asked, **markers}.items()}
        names = {id(tensor): name for name, tensor in weights.items()}
        kept = [*weights.values()]  # no other object gets the id of one of these
        try:
            made = cast(Any, _tree_of(model)).sanitize(weights)
        except KeyError as error:
            new = _asked_for(model, error.args[0], markers, checkpoint)
            if tries == _MAX_ASKED or new.keys() <= asked.keys():
                raise
            asked |= new
            continue
        origins = {name: names.get(id(tensor)) for name, tensor in made.items()}
        del kept
        return {
            name: (tensor, origins[name])
            for name, tensor in made.items()
            if origins[name] is None or origins[name] in markers
        }
    raise RuntimeError


def _asked_for(model: nn.Module, name: object, markers: Weights, checkpoint: Weights) -> Weights:
    """The tensor `name`, or all that lie below it; one that the model does not have, for each layer alike."""
    if not isinstance(name, str):
        return {}
    below = {other: own for other, own in checkpoint.items() if f"{other}.".startswith(f"{name}.")}
    if below:
        return below
    kin = [own for other, own in markers.items() if _NUMBER.sub("*", other) == _NUMBER.sub("*", name)]
    made = kin[0] if kin else mx.zeros((64, 64))
    layers = {found[0] for other in checkpoint if (found := _NUMBER.search(other)) is not None}
    # A `sanitize` that takes a module out where its weight is missing has done so in the model already.
    inner = (path for path, module in model.named_modules() if path and hasattr(module, "sanitize"))
    made_for = {name: made} | {
        f"{prefix}{name}.weight": made for prefix in ("", *(f"{one}." for one in inner))
    }
    return made_for | {_NUMBER.sub(layer, name, count=1): made for layer in sorted(layers)}


def _tree_of(node: Any) -> Any:
    """A copy of the tree of modules, base modules in the place of wrappers; modules of a kind are shared."""
    if isinstance(node, nn.Module):
        node = node.reverted() if is_wrapper(node) else node
        if kind_of(node) is not None:
            return node
        made = copy.copy(node)
        for name, child in node.items():
            if isinstance(child, nn.Module | list | tuple | dict):
                made[name] = _tree_of(child)
        return made
    if isinstance(node, list | tuple):
        return type(node)(_tree_of(child) for child in node)
    return {name: _tree_of(child) for name, child in node.items()} if isinstance(node, dict) else node

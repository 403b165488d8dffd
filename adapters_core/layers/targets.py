"""Which modules of a model an adapter adapts: the model's layers, the default keys, a config's choice.

The choice is mlx-lm's (`mlx_lm.tuner.utils.linear_to_lora_layers`), so that files are interchangeable;
what mlx-lm would adapt and this package cannot is refused by name, not left out. Wrappers that this
package put into the model are seen through to the module they stand for. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Protocol, TypeGuard, runtime_checkable

import mlx.nn as nn

from ..config import AdapterConfig, FineTuneType
from ..errors import InvalidAdapterError, UnsupportedModelError
from .modules import kind_of, no_dora
from .surgery import locate

__all__ = [
    "Wrapper",
    "adaptable_layers",
    "default_keys",
    "find_targets",
    "is_wrapper",
    "module_at",
    "named_base_modules",
    "named_modules",
    "resolve_targets",
]


@runtime_checkable
class Wrapper(Protocol):
    """A module that stands in the place of a base module."""

    def reverted(self) -> nn.Module:
        """The base module, the very object."""
        ...


def is_wrapper(module: object) -> TypeGuard[Wrapper]:
    """As `isinstance(module, Wrapper)`, which takes microseconds for each of a model's many modules."""
    return hasattr(type(module), "reverted")


def named_modules(module: nn.Module, *, wrapped: bool = True) -> list[tuple[str, nn.Module]]:
    """`module.named_modules()`, in the same order, at a fraction of its cost.

    With `wrapped` False, base modules are found under the wrappers' paths, in the wrappers' stead.
    """
    found: list[tuple[str, nn.Module]] = []
    stack: list[tuple[str, nn.Module]] = [("", module)]
    while stack:
        path, inner = stack.pop()
        if not wrapped and is_wrapper(inner):
            inner = inner.reverted()
        found.append((path, inner))
        _push_children(f"{path}." if path else "", inner, stack)
    return found


def _push_children(prefix: str, parent: Any, stack: list[tuple[str, nn.Module]]) -> None:
    for key, child in parent.items() if isinstance(parent, dict) else enumerate(parent):
        if isinstance(child, nn.Module):
            stack.append((f"{prefix}{key}", child))
        elif isinstance(child, dict | list | tuple):
            _push_children(f"{prefix}{key}.", child, stack)


def named_base_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """`module.named_modules()` as if nothing were wrapped: base modules under the wrappers' paths."""
    return named_modules(module, wrapped=False)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The base module at `path`, seen through wrappers.

    Raises:
        LookupError: there is none.
    """
    _, _, module = locate(model, path, lambda node: node.reverted() if is_wrapper(node) else node)
    return module


def adaptable_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of `model` in order, each with its path.

    Raises:
        UnsupportedModelError: they are not reachable as `model.layers`.
    """
    return _located_layers(model, named_modules(model))


def _located_layers(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """As `adaptable_layers`, with all of the model's `modules` at hand."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, Sequence) or not layers:
        raise UnsupportedModelError(
            [f"expected the model's layers as a list at model.layers; {type(model).__name__} has none there"]
        )
    paths = {id(module): path for path, module in reversed(modules)}
    lost = [
        index
        for index, layer in enumerate(layers)
        if not isinstance(layer, nn.Module) or id(layer) not in paths
    ]
    if lost:
        raise UnsupportedModelError(
            [f"expected model.layers[{index}] to be a module inside the model, it is not" for index in lost]
        )
    return [(paths[id(layer)], layer) for layer in layers]


def _by_layer(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]]
) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    """The path of each layer, and those of the model's `modules` that lie in it, by their paths there."""
    places = {path: place for place, (path, _) in reversed(list(enumerate(modules)))}
    found: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    for path, layer in _located_layers(model, modules):
        # What lies in a module follows it: one walk of the whole model, which a load waits for, is enough.
        after, head = modules[places[path] + 1 :], f"{path}."
        inside = takewhile(lambda each, head=head: each[0].startswith(head), after)
        found.append((path, [("", layer), *((inner.removeprefix(head), module) for inner, module in inside)]))
    return found


def default_keys(model: nn.Module) -> list[str]:
    """Paths, relative to a layer, of all modules that can be adapted, in order of appearance."""
    return list(
        dict.fromkeys(
            key
            for _, modules in _by_layer(model, named_base_modules(model))
            for key, module in modules
            if kind_of(module) is not None
        )
    )


def resolve_targets(model: nn.Module, config: AdapterConfig, source: str = "config") -> dict[str, nn.Module]:
    """The base modules that `config` adapts in `model`, by full path.

    Raises:
        UnsupportedModelError: the model's layers cannot be reached.
        InvalidAdapterError: keys that match nothing, or modules that cannot be adapted; all are named,
            with `source` as where the config came from.
    """
    targets, problems = find_targets(model, config)
    if problems:
        raise InvalidAdapterError(source, problems)
    return targets


def find_targets(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Module], list[str]]:
    """As `resolve_targets`, with the problems returned beside the targets that are well."""
    everywhere = named_base_modules(model)
    layers = _by_layer(model, everywhere)
    given = config.lora_parameters.keys
    keys = set(given if given is not None else _mlx_lm_keys(layers))
    # -0 as a start is the whole list: no number of layers, or a negative one, means all.
    chosen = layers[-max(config.num_layers, 0) :]
    matched: dict[str, nn.Module] = {}
    used: set[str] = set()
    problems: list[str] = []
    for path, modules in chosen:
        for key, module in modules:
            if key in keys:
                matched[f"{path}.{key}" if key else path] = module
                used.add(key)
    for path, module in everywhere:
        if path in keys:
            if path in matched:
                problems.append(f"{path} is named twice by the keys, in full and relative to its layer")
            matched[path] = module
            used.add(path)
    if given is not None:
        skipped = {key for _, modules in layers for key, _ in modules}
        problems += [
            _unmatched(key, key in skipped, config.num_layers)
            for key in dict.fromkeys(given)
            if key not in used
        ]
    is_dora = config.fine_tune_type is FineTuneType.DORA
    unfit = {path: reason for path, module in matched.items() if (reason := _unfit(path, module, is_dora))}
    targets = {path: module for path, module in matched.items() if path not in unfit}
    problems += unfit.values()
    if not matched and not problems:
        problems.append("no layer of the model has a module that can be adapted")
    return targets, problems


def _mlx_lm_keys(layers: Sequence[tuple[str, list[tuple[str, nn.Module]]]]) -> list[str]:
    return [
        key
        for _, modules in layers
        for key, module in modules
        if hasattr(module, "to_lora") or kind_of(module) is not None
    ]


def _unmatched(key: str, exists: bool, num_layers: int) -> str:
    if exists:
        return f"key {key!r} matches only layers that num_layers = {num_layers} leaves out"
    return (
        f"key {key!r} matches no module of the model; expected a path relative to a layer "
        "(such as self_attn.q_proj) or a full path"
    )


def _unfit(path: str, module: nn.Module, is_dora: bool) -> str | None:
    """Why the module at `path` cannot be adapted; None if it can."""
    name = type(module).__name__
    if kind_of(module) is not None:
        if not is_dora or (why := no_dora(module)) is None:
            return None
        reason = f"a {name}: {why}"
    elif hasattr(module, "to_lora"):
        reason = f"a {name}, which has adapters of a form of its own (its to_lora)"
    else:
        reason = f"a {name}; only linear layers, embeddings and switch layers of experts can be adapted"
    return f"{path} is {reason}. Train the adapter with lora_parameters.keys that leave it out"

"""Replaces modules inside a model, all or none, and puts the very same ones back.

Does not know what the modules compute. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..errors import ContainerStateError, UnsupportedModelError

__all__ = ["Modes", "Surgery", "copy_modes", "locate", "replace_modules"]


@dataclass(frozen=True, slots=True)
class _Change:
    """`parent[key]`, at `path`, was `old` and is `new`."""

    path: str
    parent: Any
    key: Any
    old: nn.Module
    new: nn.Module


class Surgery:
    """Modules that were replaced, and the way back."""

    def __init__(self, changes: list[_Change]) -> None:
        self._changes = changes
        self._undone = False

    @property
    def replaced(self) -> dict[str, nn.Module]:
        """The modules that were there before, by path."""
        return {change.path: change.old for change in self._changes}

    def undo(self) -> None:
        """Put every module back that was there before; the model is bit for bit what it was.

        Raises:
            ContainerStateError: it was undone already, or something else has replaced a module since;
                nothing is changed then.
        """
        if self._undone:
            raise ContainerStateError("these modules were put back already")
        moved = [change.path for change in self._changes if change.parent[change.key] is not change.new]
        if moved:
            raise ContainerStateError(
                f"expected the modules that were put there, but others have replaced {', '.join(moved)}; "
                "undo the later change first"
            )
        for change in self._changes:
            change.parent[change.key] = change.old
        self._undone = True


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Surgery:
    """Put each of `modules` at its path (as in `model.named_modules()`) in `model`.

    Every path is found before the first is changed, so that a failure changes nothing.

    Raises:
        UnsupportedModelError: paths that lead to no module, or two paths that lead to the same place.
    """
    reasons: list[str] = []
    changes: list[_Change] = []
    places: dict[tuple[int, Any], str] = {}
    for path, new in modules.items():
        try:
            parent, key, old = locate(model, path)
        except LookupError as error:
            reasons.append(str(error.args[0]))
            continue
        other = places.setdefault((id(parent), key), path)
        if other != path:
            reasons.append(f"{other} and {path} are the same module, shared between layers")
        changes.append(_Change(path, parent, key, old, new))
    if reasons:
        raise UnsupportedModelError(reasons)
    for change in changes:
        change.parent[change.key] = change.new
    return Surgery(changes)


def locate(
    model: nn.Module, path: str, through: Callable[[Any], Any] = lambda node: node
) -> tuple[Any, Any, nn.Module]:
    """Where the module at `path` hangs (a module, dict or list, and the key in it), and the module.

    What `through` gives for a node on the way, the last one included, stands in its stead.

    Raises:
        LookupError: there is no module at `path`.
    """
    parent: Any = None
    key: Any = None
    node: Any = model
    for part in path.split("."):
        parent = node
        key = int(part) if isinstance(parent, list) and part.isdecimal() else part
        try:
            node = through(parent[key]) if isinstance(parent, dict | list) else None
        except (KeyError, IndexError, TypeError):
            node = None
        if node is None:
            break
    if not isinstance(node, nn.Module):
        raise LookupError(f"the model has no module at {path!r}")
    return parent, key, node


class Modes:
    """Which parameters of a model's modules are frozen, and whether the modules train, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, set(module._no_grad), module.training) for module in model.modules()]

    def restore(self) -> None:
        """Set the modules that were there to what they were."""
        for module, frozen, training in self._modes:
            _set_modes(module, frozen, training)


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Freeze in `target` what is frozen in `source`, and let it train if `source` does."""
    _set_modes(target, set(source._no_grad), source.training)


def _set_modes(module: nn.Module, frozen: set[str], training: bool) -> None:
    module._no_grad = frozen
    if module.training is not training:
        module._set_training_mode(training)

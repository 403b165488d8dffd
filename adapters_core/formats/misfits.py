"""What is behind many problems of one adapter on one model: it was trained on another.

Each is a sentence that stands before the problems themselves. Goes by names and sizes. Changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.nn as nn

from ..config import CONFIG_FILE
from ..layers.modules import ModuleKind, kind_of, weight_shape
from .peft.names import is_head

__all__ = ["Placed", "causes_on"]

_INNER = "language_model."
_NUMBER = re.compile(r"\.(\d+)\.")
_SEEN = re.compile(
    r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector)\."
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A module as a file has it: its name there, its place in the model, and the sizes of its factors.

    `place` is None where the model has none. `inputs` and `outputs` are None where the factors do not say.
    """

    name: str
    place: str | None
    inputs: int | None = None
    outputs: int | None = None
    rank: int | None = None


def causes_on(
    modules: Mapping[str, nn.Module], found: Iterable[Placed], *, rank: int | None, base_name: str | None
) -> tuple[str, ...]:
    """Why many modules that were `found` in a file do not fit the model's `modules`, by path.

    `rank` is the config's, where all modules have one; `base_name` is the base that the config names.
    """
    found = list(found)
    placed = [(one, modules[one.place]) for one in found if one.place is not None and one.place in modules]
    if not found:
        return ()
    named = f" {CONFIG_FILE} names the base {_last(base_name)!r}." if base_name else ""
    if not placed:
        return (_joined(_of_nothing_here(modules, found), named),)
    causes = [_other_depth(modules, found), _other_width(modules, placed), _other_rank(found, rank)]
    told = [cause for cause in causes if cause]
    if lost := [one.name for one in found if one.place not in modules and _SEEN.search(one.name)]:
        told.append(
            f"{len(lost)} of {len(found)} modules are of a part for images or sound, which this model "
            "lacks; train the adapter on the language model alone"
        )
    if told:
        told[0] = _joined(told[0], named)
    return tuple(told)


def _joined(cause: str, named: str) -> str:
    return f"{cause}.{named}" if named else cause


def _of_nothing_here(modules: Mapping[str, nn.Module], found: list[Placed]) -> str:
    """Why none of the modules is in the model."""
    names = [one.name for one in found]
    if all(is_head(name) for name in names):
        return (
            "the adapter is for a head of the model's own, and this model's head is tied to its embedding. "
            "PEFT's format can say that a tied head is adapted alone"
        )
    if any(name.startswith(_INNER) and name.removeprefix(_INNER) in modules for name in names):
        return (
            f"the adapter is for a model for images or sound, whose language model lies in {_INNER[:-1]}, as "
            "mlx-vlm has it, and this is the language model alone; serve it beside its own model"
        )
    return _other_architecture(modules, found)


def _other_architecture(modules: Mapping[str, nn.Module], found: list[Placed]) -> str:
    theirs = min((one.name for one in found), key=_place_in_order)
    inside = [path for path in modules if _NUMBER.search(f".{path}.") and kind_of(modules[path])]
    ours = min(inside or list(modules), key=_place_in_order)
    return (
        f"the adapter is for another architecture: none of its {len(found)} modules, such as {theirs}, is in "
        f"this model, which has modules such as {ours}"
    )


def _other_depth(modules: Mapping[str, nn.Module], found: list[Placed]) -> str | None:
    layers = _last_layer(modules)
    wanted = max((_layer(one.name) for one in found), default=-1)
    if not 0 <= layers < wanted:
        return None
    return (
        f"the adapter was trained on another base: it has tensors for layer {wanted}, and the last of this "
        f"model's layers is {layers}, counted from 0"
    )


def _other_width(modules: Mapping[str, nn.Module], placed: list[tuple[Placed, nn.Module]]) -> str | None:
    """Where all layers that read the hidden state read another number of features."""
    widths = {
        weight_shape(module)[-1]
        for path, module in modules.items()
        if kind_of(module) is ModuleKind.EMBEDDING and not _NUMBER.search(f".{path}.")
    }
    if len(widths) != 1:
        return None
    (width,) = widths
    reading = [
        one.inputs
        for one, module in placed
        if kind_of(module) in (ModuleKind.LINEAR, ModuleKind.SPLIT) and weight_shape(module)[-1] == width
    ]
    sizes = {size for size in reading if size is not None}
    if len(sizes) != 1 or sizes == {width}:
        return None
    return f"the adapter was trained on another base: its hidden size is {sizes.pop()}, this one's {width}"


def _other_rank(found: list[Placed], rank: int | None) -> str | None:
    ranks = {one.rank for one in found if one.rank is not None}
    if rank is None or len(ranks) != 1 or ranks == {rank}:
        return None
    return (
        f"the tensors are of rank {ranks.pop()}, and {CONFIG_FILE} says {rank}: one of the files is of "
        "another training. Put both from the same one there"
    )


def _layer(name: str) -> int:
    number = _NUMBER.search(f".{name}.")
    return int(number[1]) if number and len(number[1]) < 9 else -1


def _last_layer(modules: Iterable[str]) -> int:
    return max((_layer(path) for path in modules), default=-1)


def _place_in_order(name: str) -> tuple[float, str]:
    layer = _layer(name)
    return (math.inf if layer < 0 else layer, name)


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1][:200]

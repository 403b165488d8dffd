"""Which modules a file in mlx-lm's format adapts, whichever version of mlx-lm wrote it.

Without `keys`, each version chose modules of its own: up to 0.28.0 query and value alone, for most models,
and all later. A file has tensors for every module that its version chose, so that these tell the keys. From
0.19.0 to 0.21.4, `num_layers` meant all layers if it was positive, and the number of the first ones that were
left out if it was negative; these versions wrote `alpha` too, which later ones do not. Changes no model. Any
thread.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import mlx.nn as nn

from ..config import CONFIG_FILE, AdapterConfig
from ..layers.targets import adaptable_layers, find_targets

__all__ = ["Adapted", "find_adapted"]


@dataclass(frozen=True, slots=True)
class Adapted:
    """Base modules by path, why some cannot be adapted, and what is to be told of the choice.

    `cause` is why the file's tensors may be others than those of the choice.
    """

    targets: dict[str, nn.Module]
    problems: list[str]
    notes: tuple[str, ...] = ()
    cause: str | None = None


def find_adapted(model: nn.Module, config: AdapterConfig, paths: Collection[str]) -> Adapted:
    """The modules that `config` adapts; `paths` are those that the file has tensors for.

    Raises:
        UnsupportedModelError: the model's layers cannot be reached.
    """
    layers = [path for path, _ in adaptable_layers(model)]
    config = _with_keys(config, paths, layers)
    chosen = Adapted(*find_targets(model, config))
    if chosen.targets.keys() == set(paths):
        return chosen
    if (count := _as_trained(config, len(layers))) is None:
        return chosen
    trained = find_targets(model, config.model_copy(update={"num_layers": count}))
    if trained[0].keys() != set(paths):
        return chosen
    said = (
        f"{CONFIG_FILE} says num_layers {config.num_layers}, and the file has tensors for the last {count} "
        f"of {len(layers)} layers, as mlx-lm 0.19.0 to 0.21.4 trained with this number"
    )
    if "alpha" in (config.lora_parameters.model_extra or {}):
        return Adapted(*trained, (f"{said}; all of these are served.",))
    return replace(chosen, cause=f"{said}. If one of these wrote it, set num_layers to {count}")


def _with_keys(config: AdapterConfig, paths: Collection[str], layers: list[str]) -> AdapterConfig:
    """`config` with keys, those of the file if it has none; without tensors in layers, as it is."""
    if config.lora_parameters.keys is not None:
        return config
    heads = {f"{layer}." for layer in layers}
    keys = dict.fromkeys(key for path in sorted(paths) if (key := _relative(path, heads)) is not None)
    if not keys:
        return config
    parameters = config.lora_parameters.model_copy(update={"keys": list(keys)})
    return config.model_copy(update={"lora_parameters": parameters})


def _relative(path: str, heads: Collection[str]) -> str | None:
    """`path` within its layer, of which `heads` are the beginnings."""
    dot = path.find(".")
    while dot >= 0:
        if path[: dot + 1] in heads:
            return path[dot + 1 :]
        dot = path.find(".", dot + 1)
    return None


def _as_trained(config: AdapterConfig, layers: int) -> int | None:
    """The number of last layers that mlx-lm 0.19.0 to 0.21.4 adapted for this `num_layers`, if another."""
    given = config.num_layers
    if not config.has_todays_layers or given == 0 or not -layers < given < layers:
        return None
    return layers if given > 0 else layers + given

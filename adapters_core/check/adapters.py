"""The adapters of a check: LoRA and DoRA of several ranks and targets, written as mlx-lm's trainer does.

Runs on the thread that owns the model, which it only reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..config import CONFIG_FILE, AdapterConfig, FineTuneType, LoRAParameters
from ..container import AdapterContainer
from ..drawing import draw_tensors
from ..formats.weights import WEIGHTS_FILE, save_weights
from ..layers.modules import ModuleKind, kind_of
from ..layers.targets import default_keys, module_at, named_base_modules
from ..mixed.experts import routes_rows

__all__ = ["BLEND", "Recipe", "recipes", "write_blend", "write_recipe"]

_SCALE = 10.0
_RANKS = (8, 16, 32)
BLEND = (("lora-8-qv", 1.0), ("lora-16-qv", -0.5))
"""The names and weights of a blend; -0.5 times a number is exact in every type."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter; `keys` are its modules' paths in each layer."""

    name: str
    type: FineTuneType
    rank: int
    keys: tuple[str, ...]

    @property
    def config(self) -> AdapterConfig:
        """Its adapter_config.json."""
        parameters = LoRAParameters(rank=self.rank, scale=_SCALE, keys=list(self.keys))
        return AdapterConfig(fine_tune_type=self.type, num_layers=-1, lora_parameters=parameters)


def recipes(model: nn.Module) -> list[Recipe]:
    """LoRA of three ranks on three sets of modules, three DoRAs, and LoRA of experts where there are any.

    The sets are query and value, all of the attention, and all linear layers; a model whose modules have
    other names gets its first module, the first half of them, and all.

    Raises: UnsupportedModelError: the model's layers cannot be reached.
    """
    kinds = _kinds(model)
    linear = [key for key, kind in kinds.items() if kind is ModuleKind.LINEAR]
    every = [key for key, kind in kinds.items() if kind in (ModuleKind.LINEAR, ModuleKind.SPLIT)] or [*kinds]
    sets = {
        "qv": [key for key in every if key.endswith((".q_proj", ".v_proj"))] or every[:1],
        "attention": [key for key in every if "attn" in key or "attention" in key]
        or every[: (len(every) + 1) // 2],
        "all": every,
    }
    lora, dora = FineTuneType.LORA, FineTuneType.DORA
    found = [
        Recipe(f"lora-{rank}-{name}", lora, rank, tuple(keys))
        for rank in _RANKS
        for name, keys in sets.items()
    ]
    for rank, (name, keys) in zip(_RANKS, sets.items(), strict=True):
        if possible := tuple(key for key in keys if key in linear):
            found.append(Recipe(f"dora-{rank}-{name}", dora, rank, possible))
    if experts := tuple(key for key, kind in kinds.items() if kind is ModuleKind.SWITCH):
        found.append(Recipe("lora-4-experts", lora, 4, experts))
    return found


def _kinds(model: nn.Module) -> dict[str, ModuleKind]:
    """The kind of each module that rows can adapt, by its path in a layer."""
    found: dict[str, ModuleKind] = {}
    modules = named_base_modules(model)
    for key in default_keys(model):
        path, module = next(one for one in modules if f".{one[0]}".endswith(f".{key}"))
        kind = kind_of(module)
        if kind is ModuleKind.SWITCH and not routes_rows(module_at(model, path.rpartition(".")[0])):
            continue
        if kind is not None and kind is not ModuleKind.EMBEDDING:
            found[key] = kind
    return found


def write_recipe(model: nn.Module, recipe: Recipe, folder: Path, seed: int) -> None:
    """The adapter of `recipe` with random tensors, as a folder in mlx-lm's format."""
    _write(folder, recipe.config, draw_tensors(model, recipe.config, seed))


def write_blend(parts: Sequence[tuple[Path, float]], folder: Path) -> None:
    """One adapter that computes the weighted sum of LoRAs of the same modules and scale.

    Its factors are [A₁ A₂] and [w₁ B₁; w₂ B₂], so that mlx-lm can compute a blend with its own layers.
    """
    read = [AdapterContainer.from_directory(folder) for folder, _ in parts]
    tensors: dict[str, mx.array] = {}
    for name in read[0].parameters:
        factors = [one.parameters[name] for one in read]
        if ".lora_a" in name:
            tensors[name] = mx.concatenate(factors, axis=1)
        else:
            weighted = [factor * weight for factor, (_, weight) in zip(factors, parts, strict=True)]
            tensors[name] = mx.concatenate(weighted)
    config = read[0].config
    rank = sum(one.config.lora_parameters.rank for one in read)
    parameters = config.lora_parameters.model_copy(update={"rank": rank})
    _write(folder, config.model_copy(update={"lora_parameters": parameters}), tensors)


def _write(folder: Path, config: AdapterConfig, tensors: dict[str, mx.array]) -> None:
    folder.mkdir(parents=True)
    save_weights(folder / WEIGHTS_FILE, tensors)
    config.write(folder / CONFIG_FILE)

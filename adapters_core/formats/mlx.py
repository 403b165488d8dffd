"""Adapters in mlx-lm's format: adapter_config.json with lora_parameters, and adapters.safetensors.

Tensors are named by paths in the MLX model, so that mapping them is looking them up. Runs on any thread;
changes no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ..config import CONFIG_FILE, AdapterConfig, FineTuneType
from ..layers.module_weights import ModuleWeights
from ..layers.modules import factor_shapes
from ..layers.targets import named_base_modules, named_modules
from .causes import causes_of_names
from .misfits import Placed, causes_on
from .mlx_targets import find_adapted
from .protocol import FormatName, Mapped
from .tensor_names import LEAVES, is_leaf, split_name, tensors_of, weights_of

__all__ = ["MlxFormat"]


_OF_THE_BASE = ("weight", "bias", "scales", "biases")


@dataclass(frozen=True, slots=True)
class MlxFormat:
    """An adapter as mlx-lm's files say it is; `notes` are on how its tensors were read."""

    config: AdapterConfig
    tensors: Mapping[str, mx.array]
    name: FormatName = "mlx"
    notes: tuple[str, ...] = ()

    @property
    def type(self) -> FineTuneType:
        """`fine_tune_type`."""
        return self.config.fine_tune_type

    @property
    def dropout(self) -> float:
        """`lora_parameters.dropout`."""
        return self.config.lora_parameters.dropout

    @property
    def base_name(self) -> str | None:
        """`model`."""
        return self.config.base_name

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields of the training."""
        return self.config.ignored_fields

    @property
    def meaning(self) -> JsonValue:
        """The fields that decide what the adapter computes."""
        parameters = self.config.lora_parameters
        return [
            self.config.fine_tune_type.value,
            self.config.num_layers,
            parameters.rank,
            parameters.scale,
            list(parameters.keys) if parameters.keys is not None else None,
        ]

    def on(self, model: nn.Module) -> Mapped:
        """Every target needs its tensors, and every tensor a target."""
        adapted = find_adapted(model, self.config, {split_name(name)[0] for name in self.tensors})
        targets, problems = adapted.targets, adapted.problems
        rank = self.config.lora_parameters.rank
        is_dora = self.type is FineTuneType.DORA
        shapes = {path: factor_shapes(module, rank, is_dora) for path, module in targets.items()}
        expected = {f"{path}.{leaf}": shape for path in shapes for leaf, shape in shapes[path].items()}
        for name, shape in expected.items():
            if name not in self.tensors:
                problems.append(f"tensor {name}: expected shape {shape}, the file has none of this name")
            elif self.tensors[name].shape != shape:
                problems.append(
                    f"tensor {name}: expected shape {shape} (rank {rank}), got {self.tensors[name].shape}"
                )
        left_over = sorted(self.tensors.keys() - expected.keys())
        if left_over:
            known = {path for path, _ in named_modules(model)}
            problems += [_left_over(name, known, shapes, self.config) for name in left_over]
        if problems:
            causes = [adapted.cause] if adapted.cause else self._causes(model)
            return Mapped({}, problems, causes=tuple(causes))
        scale = self.config.lora_parameters.scale
        leaves = {path: {leaf: self.tensors[f"{path}.{leaf}"] for leaf in shapes[path]} for path in shapes}
        weights = {path: weights_of(leaves[path], scale) for path in leaves}
        return Mapped(weights, [], (*self.config.notes, *adapted.notes, *self.notes))

    def _causes(self, model: nn.Module) -> Sequence[str]:
        """What may be behind problems on `model`."""
        if causes := causes_of_names(self.tensors.keys(), is_peft=False):
            return causes
        modules = dict(named_base_modules(model))
        found = [_placed(path, self.tensors, path in modules) for path in _paths(self.tensors)]
        rank = self.config.lora_parameters.rank
        return causes_on(modules, found, rank=rank, base_name=self.base_name)

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> MlxFormat:
        """The same config with other values."""
        return MlxFormat(self.config, tensors_of(weights))


def _paths(tensors: Mapping[str, mx.array]) -> list[str]:
    """The modules that `tensors` name."""
    return list(dict.fromkeys(path for path, leaf in map(split_name, tensors) if path and is_leaf(leaf)))


def _placed(path: str, tensors: Mapping[str, mx.array], is_there: bool) -> Placed:
    """A module as the file has it, with its sizes where a plain pair of factors says them."""
    place = path if is_there else None
    a, b = tensors.get(f"{path}.lora_a"), tensors.get(f"{path}.lora_b")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return Placed(path, place)
    return Placed(path, place, a.shape[0], b.shape[1], a.shape[1] if a.shape[1] == b.shape[0] else None)


def _left_over(
    name: str, modules: set[str], targets: Mapping[str, Collection[str]], config: AdapterConfig
) -> str:
    """Why a tensor is a problem; `targets` are what the adapted modules' tensors are called."""
    path, leaf = split_name(name)
    if leaf == "m" and config.fine_tune_type is FineTuneType.LORA and path in modules:
        return f"tensor {name}: not expected: a magnitude, but fine_tune_type is lora (dora has magnitudes)"
    if leaf in _OF_THE_BASE and path in modules:
        return (
            f"tensor {name}: not expected: not the name of an adapter's tensor but a weight of the base, "
            "which was trained whole; all requests share the base: put the adapter into it with `mlx_lm.fuse`"
        )
    if not is_leaf(leaf):
        return f"tensor {name}: not expected: not the name of an adapter's tensor ({', '.join(LEAVES)})"
    if path not in modules:
        return f"tensor {name}: not expected: the model has no module {path}"
    if path in targets:
        return f"tensor {name}: not expected: the tensors of this module are {', '.join(targets[path])}"
    return (
        f"tensor {name}: not expected: {CONFIG_FILE} leaves this module out "
        f"(num_layers {config.num_layers}, keys {config.lora_parameters.keys})"
    )

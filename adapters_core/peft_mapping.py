"""Maps the factors of a PEFT file onto an MLX model: the place, the orientation and the scale of each.

What PEFT would do with the same folder and base is the reference: a module is adapted if the config targets
it and the file has its factors. Whatever is targeted and not in the file, or in the file and not targeted,
is a problem, and every problem is listed. Changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from .config import CONFIG_FILE
from .formats import Mapped
from .module_weights import ModuleWeights
from .modules import ModuleKind, kind_of, weight_shape
from .peft_config import PeftConfig
from .peft_factors import Contents, Factors, sort_tensors
from .peft_names import Leaf
from .peft_paths import PathRule, find_rule
from .peft_targets import all_linear, is_target, pattern_value
from .targets import named_base_modules

__all__ = ["map_onto"]

_HEADS = ("lm_head", "embed_out")
_TARGETING = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
)


def map_onto(model: nn.Module, config: PeftConfig, tensors: Mapping[str, mx.array]) -> Mapped:
    """The weights by path in `model`, with every problem."""
    return _Mapping(model, config, sort_tensors(tensors)).result()


class _Mapping:
    """One adapter and one model; `weights` and `problems` grow as its modules are taken one by one."""

    def __init__(self, model: nn.Module, config: PeftConfig, contents: Contents) -> None:
        self._config = config
        self._contents = contents
        self._modules = {path: module for path, module in named_base_modules(model) if kind_of(module)}
        self._rule: PathRule = find_rule((path for path, _ in contents.factors), self._modules.__contains__)
        self._weights: dict[str, ModuleWeights] = {}
        self._problems = list(contents.problems)
        self._seen: set[str] = set()

    def result(self) -> Mapped:
        for factors in self._contents.factors.values():
            self._take(factors)
        self._find_missing()
        if not self._weights and not self._problems:
            self._problems.append("expected tensors of an adapter, the file has none")
        mx.eval([[w.lora_a, w.lora_b, w.magnitude, w.bias] for w in self._weights.values()])
        return Mapped(self._weights, self._problems)

    def _take(self, factors: Factors) -> None:
        path = self._rule.to_mlx(factors.path)
        module = None if path is None else self._modules.get(path)
        if path is None or module is None or factors.depth:
            self._problems += factors.refused(f"the model has no module {factors.path} that can be adapted")
            return
        self._seen.add(path)
        if not self._is_target(factors.path, module):
            self._problems += factors.refused(self._leaves_out(factors.path))
            return
        fields = self._config.fields
        rank = int(pattern_value(fields.rank_pattern, factors.path, fields.r))
        scale = self._config.scale(rank, pattern_value(fields.alpha_pattern, factors.path, fields.lora_alpha))
        weights = self._linear(factors, module, rank, scale)
        if weights is not None:
            self._weights[path] = weights

    def _linear(self, factors: Factors, module: nn.Module, rank: int, scale: float) -> ModuleWeights | None:
        rows, columns = weight_shape(module)
        expected: dict[Leaf, tuple[int, ...]] = {Leaf.A: (rank, columns), Leaf.B: (rows, rank)}
        if self._config.fields.use_dora:
            expected[Leaf.MAGNITUDE] = (rows,)
        if self._config.fields.lora_bias:
            expected[Leaf.BIAS] = (rows,)
        if problems := factors.problems(expected, rank):
            self._problems += problems
            return None
        tensors = factors.tensors
        return ModuleWeights(
            mx.contiguous(tensors[Leaf.A].T),
            mx.contiguous(tensors[Leaf.B].T),
            tensors.get(Leaf.MAGNITUDE),
            scale,
            tensors.get(Leaf.BIAS),
        )

    def _find_missing(self) -> None:
        """Modules that the config targets and the file has no factors for."""
        adapted = {_any_layer(path) for path in self._seen}
        for path, module in self._modules.items():
            name = self._rule.to_peft(path)
            if path in self._seen or name is None or not self._is_target(name, module):
                continue
            # What is a linear layer here need not be one in the model that was trained (a router's gate).
            if all_linear(self._config.fields) and _any_layer(path) not in adapted:
                continue
            self._problems.append(
                f"module {name}: expected tensors, the file has none, though {CONFIG_FILE} targets it"
            )

    def _is_target(self, name: str, module: nn.Module) -> bool:
        is_linear = kind_of(module) is ModuleKind.LINEAR
        is_head = name.rpartition(".")[2] in _HEADS
        return is_target(self._config.fields, name, is_linear=is_linear, is_head=is_head)

    def _leaves_out(self, name: str) -> str:
        return f"{CONFIG_FILE} leaves module {name} out ({_targeting(self._config)})"


def _targeting(config: PeftConfig) -> str:
    names = (
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
    )
    values = {name: getattr(config.fields, name) for name in names}
    shown = ", ".join(f"{name} {value!r}" for name, value in values.items() if value)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)

"""What a container needs of an adapter, whatever file it came from.

A format knows how its files name modules and factors and what its config says; the container knows models,
loading and fusing. Each format has one module (`mlx`, `peft.format`); `ModulesFormat` here stands for
adapters that were made in memory. Changes no model. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ..config import FineTuneType
from ..layers.module_weights import ModuleWeights
from ..layers.modules import ModuleKind, kind_of, no_dora, output_sizes, product_shapes
from ..layers.targets import named_base_modules
from .tensor_names import tensors_of

__all__ = ["AdapterFormat", "FormatName", "Mapped", "ModulesFormat"]

FormatName = Literal["mlx", "peft"]


@dataclass(frozen=True, slots=True)
class Mapped:
    """An adapter on one model: its weights by path in the model, and every reason why they do not fit.

    `warnings` are for what fits and may not be what the file's author had in mind, `causes` for what may be
    behind the problems.
    """

    weights: dict[str, ModuleWeights]
    problems: list[str]
    warnings: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()


class AdapterFormat(Protocol):
    """An adapter as its files, or whoever made it, say it is. Immutable."""

    @property
    def name(self) -> FormatName:
        """The format that its tensors' names and its config follow."""
        ...

    @property
    def type(self) -> FineTuneType:
        """LoRA or DoRA."""
        ...

    @property
    def dropout(self) -> float:
        """What training drops of the inputs, from 0 to below 1."""
        ...

    @property
    def base_name(self) -> str | None:
        """The base that the config names."""
        ...

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields of the config that have a value and matter in training only."""
        ...

    @property
    def tensors(self) -> Mapping[str, mx.array]:
        """The evaluated tensors by the names of the format."""
        ...

    @property
    def meaning(self) -> JsonValue:
        """All besides the tensors that decides what the adapter computes."""
        ...

    def on(self, model: nn.Module) -> Mapped:
        """Map the adapter onto `model`, which is not changed.

        Raises:
            UnsupportedModelError: the model's layers cannot be reached.
        """
        ...

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> AdapterFormat:
        """The adapter with other values in the same modules, as training leaves them, by path."""
        ...


@dataclass(frozen=True, slots=True)
class ModulesFormat:
    """Modules by full path, of an adapter that was made in memory."""

    weights: Mapping[str, ModuleWeights]
    name: FormatName = "mlx"
    base_name: str | None = None
    dropout: float = 0.0
    ignored_fields: tuple[str, ...] = field(default=())

    @property
    def type(self) -> FineTuneType:
        """DoRA if any module has magnitudes."""
        is_dora = any(module.magnitude is not None for module in self.weights.values())
        return FineTuneType.DORA if is_dora else FineTuneType.LORA

    @property
    def tensors(self) -> Mapping[str, mx.array]:
        """As mlx-lm names them."""
        return tensors_of(self.weights)

    @property
    def meaning(self) -> JsonValue:
        """The scale of each module, which embeddings are adapted for look-ups alone, and which by feature."""
        scales: dict[str, JsonValue] = {path: self.weights[path].scale for path in sorted(self.weights)}
        apart: list[JsonValue] = [path for path in sorted(self.weights) if self.weights[path].lookup_only]
        by_feature: list[JsonValue] = [path for path in sorted(self.weights) if self.weights[path].by_feature]
        heads: list[JsonValue] = [path for path in sorted(self.weights) if self.weights[path].head_only]
        rest: list[JsonValue] = [{"head_only": heads}] if heads else []
        return ["modules", scales, apart, *([by_feature] if by_feature else []), *rest]

    def on(self, model: nn.Module) -> Mapped:
        """Every module has to exist and to have the shapes of its weights."""
        modules = dict(named_base_modules(model))
        problems: list[str] = []
        for path, weights in self.weights.items():
            module = modules.get(path)
            if module is None:
                problems.append(f"module {path}: the model has no module of this name")
            elif kind_of(module) is None:
                problems.append(f"module {path}: a {type(module).__name__} cannot be adapted")
            else:
                problems += _shape_problems(path, module, weights)
        if self.type is FineTuneType.DORA:
            problems += [
                f"module {path}: it has no magnitudes and others have; expected them in all or in none"
                for path, weights in self.weights.items()
                if weights.magnitude is None
            ]
        if not self.weights:
            problems.append("expected at least one module, there is none")
        return Mapped(dict(self.weights), problems)

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> ModulesFormat:
        """The same modules with other values."""
        return ModulesFormat(weights, self.name, self.base_name, self.dropout, self.ignored_fields)


def _shape_problems(path: str, module: nn.Module, weights: ModuleWeights) -> list[str]:
    is_dora = weights.magnitude is not None
    if is_dora and (reason := no_dora(module)):
        return [f"module {path}: a {type(module).__name__} cannot have magnitudes: {reason}"]
    if problems := _unfit(module, weights):
        return [f"module {path}: {problem}" for problem in problems]
    expected = product_shapes(module, weights.rank, is_dora)
    if weights.by_feature:
        expected["m"] = weights.lora_b.shape[1:]
    actual = {"lora_a": weights.lora_a.shape, "lora_b": weights.lora_b.shape}
    if weights.magnitude is not None:
        actual["m"] = weights.magnitude.shape
    if weights.parts:
        expected["parts"] = tuple(output_sizes(module)) if kind_of(module) is ModuleKind.SPLIT else ()
        actual["parts"] = tuple(b.shape[1] for _, b in weights.parts)
    if weights.bias is not None and weights.bias.shape != weights.lora_b.shape[1:]:
        actual["lora_bias"] = weights.bias.shape
    return [
        f"module {path}: {leaf}: expected shape {expected.get(leaf)}, got {actual.get(leaf)}"
        for leaf in sorted({*expected, *actual})
        if expected.get(leaf) != actual.get(leaf)
    ]


def _unfit(module: nn.Module, weights: ModuleWeights) -> list[str]:
    """What `weights` have that a module of this kind cannot follow."""
    kind, got = kind_of(module), f"got a {type(module).__name__}"
    problems = []
    if weights.by_feature and kind is not ModuleKind.EMBEDDING:
        problems.append(f"magnitudes by feature are for embeddings, {got}")
    if weights.lookup_only and kind is not ModuleKind.EMBEDDING:
        problems.append(f"factors for look-ups alone (lookup_only) are for embeddings, {got}")
    if weights.head_only and kind is not ModuleKind.EMBEDDING:
        problems.append(f"factors for a tied head alone (head_only) are for embeddings, {got}")
    if weights.bias is not None and kind not in (ModuleKind.LINEAR, ModuleKind.SPLIT):
        problems.append(f"a bias of the adapter's own is for linear layers, {got}")
    if weights.bias is not None and weights.magnitude is not None:
        problems.append("a bias and magnitudes: what one means beside the other is defined nowhere")
    return problems

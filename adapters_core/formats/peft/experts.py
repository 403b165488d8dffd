"""Experts of PEFT files, mapped onto MLX's switch layers, which hold a projection of all experts in one.

A file has them in one of two forms:

    …mlp.experts.3.up_proj.lora_A.weight     a module for each expert (transformers 4), (r, in) and (out, r)
    …mlp.experts.base_layer.lora_A.weight    parameters of all experts (target_parameters, transformers 5)

The second has A (experts · r, in), expert by expert, and B (out, r · experts), rank by rank; `gate_up_proj`
has the outputs of gate first, then those of up, and one A for both. Wrappers of several parameters are nested
in the order in which the module declares them, the last one outermost. Changes nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, weight_shape
from .config import PeftConfig
from .factors import Factors
from .names import Leaf
from .parameters import old_layout
from .paths import PathRule, any_layer
from .routers import SIBLINGS
from .targets import is_target, is_target_parameter, rank_and_scale

__all__ = ["ExpertMapping", "expert_block", "switch_block"]

_EXPERT = re.compile(r"(?P<block>.+\.experts)(?:\.(?P<index>\d+)\.(?P<projection>\w+))?")
_PARAMETERS = ("gate_up_proj", "down_proj")
_PROJECTIONS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_PROJECTIONS |= {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Models whose parameters are (experts, out, in) and whose gate and up lie one after the other.
_FUSED_MODELS = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "lfm2_moe",
        "minimax",
        "mistral4",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
    }
)

_Pair = tuple[mx.array, mx.array]


def switch_block(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The block of switch layers that holds the experts at `path` (as transformers has it), if any."""
    found = _EXPERT.fullmatch(path)
    if found is None:
        return None
    parent = found["block"].rpartition(".")[0]
    grandparent = parent.rpartition(".")[0]
    blocks = [f"{parent}.switch_mlp", f"{parent}.experts"]
    blocks += [f"{grandparent}.{sibling}.switch_mlp" for sibling in SIBLINGS]
    for block in blocks:
        module = modules.get(f"{block}.down_proj")
        if module is not None and kind_of(module) is ModuleKind.SWITCH:
            return block
    return None


def expert_block(model_type: str, path: str) -> str | None:
    """What transformers calls the block of switch layers at `path`; None where its layout is not known."""
    if model_type not in _FUSED_MODELS:
        return None
    layer, _, parent = path.rpartition(".")[0].rpartition(".")
    return f"{layer}.{parent if parent == 'feed_forward' else 'mlp'}.experts"


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer's experts: their name in the transformers model, and their block in the MLX model."""

    name: str
    path: str


class ExpertMapping:
    """The experts of one adapter on one model; `finish` maps what `take` was given."""

    def __init__(
        self, model_type: str, modules: Mapping[str, nn.Module], rule: PathRule, config: PeftConfig
    ) -> None:
        self.weights: dict[str, ModuleWeights] = {}
        self.problems: list[str] = []
        self._model_type = model_type
        self._modules = modules
        self._rule = rule
        self._config = config
        self._parameters: dict[_Block, dict[int, Factors]] = defaultdict(dict)
        self._experts: dict[tuple[_Block, str], dict[int, Factors]] = defaultdict(dict)

    def take(self, factors: Factors) -> bool:
        """Keep `factors` if they are an expert's; says whether they are."""
        path = self._rule.to_mlx(factors.path)
        found = _EXPERT.fullmatch(factors.path)
        if path is None or found is None or (switch := switch_block(self._modules, path)) is None:
            return False
        block = _Block(found["block"], switch)
        if found["index"] is None:
            self._parameters[block][factors.depth] = factors
        elif found["projection"] in _PROJECTIONS and not factors.depth:
            self._experts[block, found["projection"]][int(found["index"])] = factors
        else:
            return False
        return True

    def finish(self) -> None:
        """Map all experts."""
        if self._parameters and (reason := self._unreadable_parameters()):
            for depths in self._parameters.values():
                for factors in depths.values():
                    self.problems += factors.refused(reason)
            self._parameters.clear()
        self._add_missing_blocks()
        for block, depths in self._parameters.items():
            self._map_parameters(block, depths)
        for (block, projection), experts in self._experts.items():
            self._map_experts(block, projection, experts)

    def _map_parameters(self, block: _Block, depths: Mapping[int, Factors]) -> None:
        fields = self._config.fields
        targets = [name for name in _PARAMETERS if is_target_parameter(fields, f"{block.name}.{name}")]
        for depth, factors in depths.items():
            if depth >= len(targets):
                self.problems += factors.refused(
                    f"{CONFIG_FILE} leaves it out (target_parameters {fields.target_parameters})"
                )
        for depth, parameter in enumerate(reversed(targets)):
            if depth in depths:
                self._map_parameter(block, parameter, depths[depth])
            else:
                self.problems.append(_missing(f"parameter {block.name}.{parameter}"))

    def _map_parameter(self, block: _Block, parameter: str, factors: Factors) -> None:
        rank, scale = rank_and_scale(self._config, f"{block.name}.{parameter}")
        is_fused = parameter == "gate_up_proj"
        names = ("gate_proj", "up_proj") if is_fused else ("down_proj",)
        experts, rows, columns = weight_shape(self._modules[f"{block.path}.{names[0]}"])
        outputs = rows * len(names)
        expected = {Leaf.A: (experts * rank, columns), Leaf.B: (outputs, rank * experts)}
        if problems := factors.problems(expected, rank):
            self.problems += problems
            return
        lora_a = factors.tensors[Leaf.A].reshape(experts, rank, columns)
        lora_b = factors.tensors[Leaf.B].reshape(outputs, rank, experts).transpose(2, 0, 1)
        parts = [(lora_a, part) for part in mx.split(lora_b, len(names), axis=1)]
        for name, part in zip(names, _apart(parts) if is_fused else parts, strict=True):
            if part is not None:
                weights = ModuleWeights(part[0], mx.contiguous(part[1]), None, scale)
                self.weights[f"{block.path}.{name}"] = weights

    def _map_experts(self, block: _Block, projection: str, experts: Mapping[int, Factors]) -> None:
        fields = self._config.fields
        path = f"{block.path}.{_PROJECTIONS[projection]}"
        count, rows, columns = weight_shape(self._modules[path])
        problems: list[str] = []
        pairs: list[tuple[mx.array, mx.array, float] | None] = []
        for index in range(count):
            name = f"{block.name}.{index}.{projection}"
            factors = experts.get(index)
            is_wanted = is_target(fields, name, is_linear=True)
            if factors is None:
                problems += [_missing(f"module {name}")] if is_wanted else []
                pairs.append(None)
                continue
            rank, scale = rank_and_scale(self._config, name)
            problems += self._expert_problems(factors, is_wanted, (rank, rows, columns))
            pairs.append((factors.tensors[Leaf.A], factors.tensors[Leaf.B], scale) if not problems else None)
        for index in sorted(experts.keys() - range(count)):
            problems += experts[index].refused(f"the model has {count} experts")
        self.problems += problems
        if not problems and experts:
            self.weights[path] = _stacked(pairs)

    def _expert_problems(self, factors: Factors, is_wanted: bool, sizes: tuple[int, int, int]) -> list[str]:
        rank, rows, columns = sizes
        if not is_wanted:
            return factors.refused(f"{CONFIG_FILE} leaves module {factors.path} out")
        for field in ("use_dora", "lora_bias"):
            if getattr(self._config.fields, field):
                return factors.refused(f"{field} of an expert is not supported; train without it")
        return factors.problems({Leaf.A: (rank, columns), Leaf.B: (rows, rank)}, rank)

    def _add_missing_blocks(self) -> None:
        """Layers whose experts the file leaves out, while it has those of the same kind in other layers."""
        seen = {*self._parameters, *(block for block, _ in self._experts)}
        names = {any_layer(block.path): any_layer(block.name) for block in seen}
        paths = {block.path for block in seen}
        projections = {projection for _, projection in self._experts}
        for path in sorted({path.rpartition(".")[0] for path in self._modules} - paths):
            name = names.get(any_layer(path))
            layer = re.search(r"\.(\d+)\.", path)
            if name is None or layer is None:
                continue
            block = _Block(name.replace(".*.", f".{layer[1]}.", 1), path)
            if self._parameters:
                self._parameters[block] = {}
            for projection in projections:
                self._experts[block, projection] = {}

    def _unreadable_parameters(self) -> str | None:
        if self._model_type not in _FUSED_MODELS:
            return (
                f"how the parameters of the experts of a {self._model_type} model lie is not known; merge "
                "the adapter into its base and serve that"
            )
        return old_layout(self._config)


def _apart(parts: list[_Pair]) -> list[_Pair | None]:
    """The A and B of gate and up, without ranks that the other half alone uses; None for one that uses none.

    So the two come back that were put into one parameter without having an A in common.
    """
    gate, up = (_used_ranks(b) for _, b in parts)
    if not gate or not up:
        return [part if used or gate == up else None for part, used in zip(parts, (gate, up), strict=True)]
    if gate[-1] >= up[0]:
        return [*parts]
    (a, b_gate), (_, b_up) = parts
    half = a.shape[1] // 2
    split = half if gate[-1] < half <= up[0] else gate[-1] + 1
    return [
        (mx.contiguous(a[:, :split]), b_gate[:, :, :split]),
        (mx.contiguous(a[:, split:]), b_up[:, :, split:]),
    ]


def _used_ranks(b: mx.array) -> list[int]:
    """The ranks for which any expert has an output."""
    used = cast("list[bool]", mx.any(b, axis=(0, 1)).tolist())
    return [rank for rank, is_used in enumerate(used) if is_used]


def _stacked(pairs: list[tuple[mx.array, mx.array, float] | None]) -> ModuleWeights:
    """A (experts, r, in) and B (experts, out, r), with zeros for absent experts and up to the largest rank.

    Where scales differ, B takes the difference in.
    """
    present = [pair for pair in pairs if pair is not None]
    rank = max(a.shape[0] for a, _, _ in present)
    scale = next((own_scale for _, _, own_scale in present if own_scale), 0.0)
    zero = (mx.zeros_like(present[0][0]), mx.zeros_like(present[0][1]), scale)
    stack_a, stack_b = [], []
    for pair in pairs:
        a, b, own_scale = pair or zero
        missing = rank - a.shape[0]
        stack_a.append(mx.pad(a, [(0, missing), (0, 0)]))
        b = b if own_scale == scale else b.astype(mx.float32) * (own_scale / scale)
        stack_b.append(mx.pad(b, [(0, 0), (0, missing)]))
    return ModuleWeights(mx.stack(stack_a), mx.stack(stack_b), None, scale)


def _missing(what: str) -> str:
    return f"{what}: expected tensors, the file has none, though {CONFIG_FILE} targets it"

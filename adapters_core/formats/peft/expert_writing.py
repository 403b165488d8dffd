"""Experts and routers in PEFT's format, as parameters (target_parameters): `experts` the other way round.

gate and up are one parameter there, with one A. Where theirs differ, A has the ranks of both, and B is nought
where a rank is not its own; `experts` takes such a pair apart again. A router is no linear layer in
transformers 5 (`parameters`). Changes nothing; runs on any thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from ...layers.module_weights import ModuleWeights
from ..adapter_files import scaled
from .experts import expert_block

__all__ = ["Parameter", "expert_parameters", "router_parameter"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NESTED = ".base_layer"
_ROUTER = ".gate"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of one layer's experts, or its router; `prefix` begins its tensors' names."""

    name: str
    prefix: str
    weights: ModuleWeights

    @property
    def tensors(self) -> dict[str, mx.array]:
        """lora_A (experts · r, in), expert by expert, and lora_B (out, r · experts), rank by rank.

        Those of a matrix are a linear layer's.
        """
        a, b = self.weights.lora_a, self.weights.lora_b
        if b.ndim == 2:
            return {f"{self.prefix}.lora_A.weight": mx.contiguous(a.T)} | {
                f"{self.prefix}.lora_B.weight": mx.contiguous(b.T)
            }
        experts, outputs, rank = b.shape
        return {
            f"{self.prefix}.lora_A.weight": a.reshape(experts * rank, -1),
            f"{self.prefix}.lora_B.weight": b.transpose(1, 2, 0).reshape(outputs, rank * experts),
        }


def expert_parameters(
    weights: Mapping[str, ModuleWeights], model_type: str | None
) -> tuple[list[Parameter], list[str]]:
    """The parameters that the experts' `weights`, by path, are in a model of this type, and problems.

    `model_type` is None if there is no model to tell.
    """
    blocks: dict[str, dict[str, ModuleWeights]] = defaultdict(dict)
    problems: list[str] = []
    for path, module in weights.items():
        block, _, projection = path.rpartition(".")
        if (reason := _unknown(block, projection, model_type)) is not None:
            problems.append(f"module {path}: {reason}")
        else:
            blocks[block][projection] = module
    if problems:
        return [], problems
    found: list[Parameter] = []
    for block, parts in blocks.items():
        name = expert_block(model_type or "", block)
        gate, up, down = (parts.get(projection) for projection in _PROJECTIONS)
        prefix = f"{name}{_NESTED}" if down is not None else f"{name}"
        if (fused := _fused(gate, up)) is not None:
            found.append(Parameter(f"{name}.gate_up_proj", prefix, fused))
        if down is not None:
            found.append(Parameter(f"{name}.down_proj", f"{name}", down))
    return found, []


def router_parameter(path: str, weights: ModuleWeights, model_type: str | None) -> Parameter | None:
    """The parameter that the router at `path` is in a model of this type; None if it is no such router."""
    if not path.endswith(_ROUTER) or weights.magnitude is not None or weights.bias is not None:
        return None
    block = expert_block(model_type or "", path)
    if block is None:
        return None
    name = f"{block.rpartition('.')[0]}{_ROUTER}"
    return Parameter(f"{name}.weight", name, weights)


def _unknown(block: str, projection: str, model_type: str | None) -> str | None:
    """Why nothing is known of how PEFT would have this projection of experts."""
    if model_type is None:
        return "how transformers names and lays out experts depends on the model; name it (--model)"
    if projection not in _PROJECTIONS or expert_block(model_type, block) is None:
        return (
            f"how transformers lays out the experts of a {model_type} model is not known; write it in "
            "mlx-lm's format"
        )
    return None


def _fused(gate: ModuleWeights | None, up: ModuleWeights | None) -> ModuleWeights | None:
    """gate and up as one projection, gate's outputs first."""
    if gate is None or up is None:
        one = gate or up
        if one is None:
            return None
        nought = mx.zeros_like(one.lora_b)
        halves = [one.lora_b, nought] if up is None else [nought, one.lora_b]
        return ModuleWeights(one.lora_a, mx.concatenate(halves, axis=1), None, one.scale)
    scale = gate.scale or up.scale
    (a_gate, b_gate), (a_up, b_up) = scaled(gate, scale), scaled(up, scale)
    if a_gate.shape == a_up.shape and mx.array_equal(a_gate, a_up).item():
        return ModuleWeights(a_gate, mx.concatenate([b_gate, b_up], axis=1), None, scale)
    b_gate = mx.pad(b_gate, [(0, 0), (0, 0), (0, up.rank)])
    b_up = mx.pad(b_up, [(0, 0), (0, 0), (gate.rank, 0)])
    lora_a = mx.concatenate([a_gate, a_up], axis=1)
    return ModuleWeights(lora_a, mx.concatenate([b_gate, b_up], axis=1), None, scale)

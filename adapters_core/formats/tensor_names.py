"""What the tensors of an adapter are called in mlx-lm's files, and what they are to a module.

    PATH.lora_a, PATH.lora_b, PATH.m      of a module; m with DoRA
    PATH.lora_a.0, PATH.lora_b.0, …       of a split layer, a pair for each of its outputs

A bias of the adapter's own, which mlx-lm lacks, is called `lora_bias` here. Up to 0.28.1, mlx-lm wrote A of
experts as (experts * r, in). Knows no model. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..layers.module_weights import ModuleWeights

__all__ = [
    "LEAVES",
    "is_leaf",
    "part_problems",
    "split_name",
    "tensors_of",
    "weights_of",
    "with_todays_shapes",
]

LEAVES = ("lora_a", "lora_b", "m")
_FACTORS = LEAVES[:2]


def tensors_of(weights: Mapping[str, ModuleWeights]) -> dict[str, mx.array]:
    """The tensors of modules by path, as mlx-lm names them."""
    tensors: dict[str, mx.array] = {}
    for path, module in weights.items():
        for index, (a, b) in enumerate(module.pairs):
            number = f".{index}" if module.parts else ""
            tensors[f"{path}.lora_a{number}"], tensors[f"{path}.lora_b{number}"] = a, b
        if module.magnitude is not None:
            tensors[f"{path}.m"] = module.magnitude
        if module.bias is not None:
            tensors[f"{path}.lora_bias"] = module.bias
    return tensors


def split_name(name: str) -> tuple[str, str]:
    """The path of a tensor's module, and what the tensor is called in it, such as lora_b or lora_b.2."""
    path, _, leaf = name.rpartition(".")
    module, _, factor = path.rpartition(".")
    return (module, f"{factor}.{leaf}") if leaf.isdecimal() and factor in _FACTORS else (path, leaf)


def is_leaf(leaf: str) -> bool:
    """Whether an adapter's tensor can be called so in its module."""
    factor, _, index = leaf.partition(".")
    return leaf in LEAVES or (factor in _FACTORS and index.isdecimal())


def with_todays_shapes(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """`tensors` with A of experts as (experts, r, in), evaluated where they are."""
    today = dict(tensors)
    for name, a in tensors.items():
        b = tensors.get(f"{name.removesuffix('lora_a')}lora_b") if name.endswith(".lora_a") else None
        if b is None or (a.ndim, b.ndim) != (2, 3):
            continue
        experts, _, rank = b.shape
        if a.shape[0] == experts * rank:
            today[name] = a.reshape(experts, rank, a.shape[1])
            mx.eval(today[name])
    return today


def weights_of(leaves: Mapping[str, mx.array], scale: float) -> ModuleWeights:
    """What the tensors of one module, which are all there, bring to it; evaluated where they are."""
    if "lora_a.0" not in leaves:
        return ModuleWeights(leaves["lora_a"], leaves["lora_b"], leaves.get("m"), scale)
    count = len(leaves) // 2
    parts = [(leaves[f"lora_a.{index}"], leaves[f"lora_b.{index}"]) for index in range(count)]
    weights = ModuleWeights.of_parts(parts, scale)
    mx.eval(weights.lora_a, weights.lora_b)
    return weights


def part_problems(path: str, leaves: Mapping[str, mx.array], rank: int) -> list[str]:
    """Why tensors of the module `path`, some of them numbered, are not pairs of factors of `rank`."""
    pairs = [(f"lora_a.{index}", f"lora_b.{index}") for index in range((len(leaves) + 1) // 2)]
    expected = {leaf for pair in pairs for leaf in pair}
    problems = [
        f"tensor {path}.{leaf}: the file has none of this name, but others of this module"
        for leaf in sorted(expected - leaves.keys())
    ]
    problems += [
        f"tensor {path}.{leaf}: not expected beside the others of this module"
        for leaf in sorted(leaves.keys() - expected)
    ]
    if problems:
        return problems
    inputs = leaves["lora_a.0"].shape[:1]
    return [
        f"module {path}: expected factors of rank {rank}, got {first} {a} and {second} {b}"
        for first, second in pairs
        for a, b in [(leaves[first].shape, leaves[second].shape)]
        if a != (*inputs, rank) or len(a) != 2 or len(b) != 2 or b[0] != rank
    ]

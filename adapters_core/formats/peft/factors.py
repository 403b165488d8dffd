"""The tensors of a PEFT file, grouped by the module that they adapt, and checked against its sizes.

Knows the file's names and shapes, not the model that the modules lie in. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ...config import CONFIG_FILE
from .names import Leaf, WholeName, is_training_buffer, not_a_factor, parse_name, whole_name

__all__ = ["Contents", "Factors", "sort_tensors"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """What a file has for one module of the transformers model, by leaf: names and tensors."""

    path: str
    depth: int
    names: dict[Leaf, str] = field(default_factory=dict)
    tensors: dict[Leaf, mx.array] = field(default_factory=dict)

    def problems(self, expected: Mapping[Leaf, Shape], rank: int) -> list[str]:
        """Factors that are missing, of another shape than `expected`, or not expected."""
        found = []
        for leaf, shape in expected.items():
            if leaf not in self.tensors:
                found.append(
                    f"tensor {self.path}.{leaf}: expected shape {shape}, the file has none of this name"
                )
            elif self.tensors[leaf].shape != shape:
                found.append(
                    f"tensor {self.names[leaf]}: expected shape {shape} (rank {rank}), "
                    f"got {self.tensors[leaf].shape}"
                )
        return found + [
            f"tensor {name}: not expected: {_not_wanted(leaf)}"
            for leaf, name in self.names.items()
            if leaf not in expected
        ]

    def refused(self, reason: str) -> list[str]:
        """One problem for each tensor."""
        return [f"tensor {name}: not expected: {reason}" for name in self.names.values()]


@dataclass(frozen=True, slots=True)
class Contents:
    """A file's factors by module and depth, whole weights of the base by tensor, and problems."""

    factors: dict[tuple[str, int], Factors]
    wholes: dict[str, WholeName]
    problems: list[str]


def sort_tensors(tensors: Mapping[str, mx.array]) -> Contents:
    """Group `tensors` by module; those of training methods' own buffers are left out."""
    contents = Contents({}, {}, [])
    for name, tensor in sorted(tensors.items()):
        parsed = parse_name(name)
        if parsed is None:
            if is_training_buffer(name):
                continue
            if (whole := whole_name(name)) is not None:
                contents.wholes[name] = whole
                continue
            contents.problems.append(f"tensor {name}: not expected: {not_a_factor(name)}")
            continue
        key = parsed.path, parsed.depth
        factors = contents.factors.setdefault(key, Factors(*key))
        if parsed.leaf in factors.names:
            contents.problems.append(
                f"tensor {name}: not expected: {factors.names[parsed.leaf]} is the same factor; a file holds "
                "one adapter"
            )
            continue
        factors.names[parsed.leaf] = name
        factors.tensors[parsed.leaf] = tensor
    return contents


def _not_wanted(leaf: Leaf) -> str:
    if leaf is Leaf.MAGNITUDE:
        return f"a magnitude, but {CONFIG_FILE} does not say use_dora"
    if leaf is Leaf.TOKENS:
        return f"rows of single tokens, and {CONFIG_FILE} has none for this module (trainable_token_indices)"
    if leaf is Leaf.BIAS:
        return f"a bias of the adapter, but {CONFIG_FILE} does not say lora_bias"
    return "not a factor of a module of this kind"

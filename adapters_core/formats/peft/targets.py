"""Which modules a PEFT config adapts, and with which rank and alpha: PEFT's own rules, by name.

As in PEFT 0.21: `check_target_module_exists` (peft/tuners/tuners_utils.py) and `get_pattern_key`
(peft/utils/other.py). Names are those of the transformers model, not of the MLX one. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...config import CONFIG_FILE
from .config import PeftConfig, PeftFields
from .names import Leaf, parse_name
from .patterns import KeyPatterns

__all__ = [
    "all_linear",
    "is_saved_whole",
    "is_target",
    "is_target_parameter",
    "named_by_tensors",
    "rank_and_scale",
]

_ALL_LINEAR = "all-linear"
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def named_by_tensors(config: PeftConfig, tensors: Iterable[str]) -> PeftConfig:
    """`config` with the modules that a file's `tensors` name, where its expressions cannot be matched.

    A training leaves factors of every module that it adapted, and of no other.
    """
    if not config.unmatched:
        return config
    found = (parse_name(name) for name in tensors)
    paths = sorted({one.path for one in found if one is not None and one.leaf is not Leaf.TOKENS})
    note = (
        f"{CONFIG_FILE}: {' and '.join(config.unmatched)} cannot be matched in linear time (look-around), so "
        f"that the file's tensors say which modules are adapted: {len(paths)}."
    )
    fields = config.fields.with_values(target_modules=paths or None)
    return replace(config, fields=fields, unmatched=(), notes=(*config.notes, note))


def all_linear(fields: PeftFields) -> bool:
    """Whether every linear layer but the head is a target."""
    return isinstance(fields.target_modules, str) and fields.target_modules.lower() == _ALL_LINEAR


def is_target(fields: PeftFields, name: str, *, is_linear: bool, is_head: bool = False) -> bool:
    """Whether the module `name` is adapted; `is_linear` and `is_head` decide for "all-linear" alone."""
    if _is_excluded(fields, name):
        return False
    targets = fields.target_modules
    if targets is None:
        return False
    if all_linear(fields):
        return is_linear and not is_head
    if fields.target_pattern is not None:
        return fields.target_pattern.fullmatch(name) is not None
    if name in fields.target_names:  # a full path is a target in whatever layer it lies
        return True
    return _has_end_in(name, fields.target_names) and _in_layers(fields, name)


def is_saved_whole(fields: PeftFields, name: str) -> bool:
    """Whether the module `name`, or one that it lies in, is saved whole (modules_to_save)."""
    saved = tuple(fields.modules_to_save or ())
    if not saved:
        return False
    around = [name, *(name[: dot.start()] for dot in re.finditer(r"\.", name))]
    return any(path.endswith(saved) for path in around)


def is_target_parameter(fields: PeftFields, name: str) -> bool:
    """Whether the parameter `name` (its module's path and its own name) is adapted."""
    return name in fields.parameter_names or _has_end_in(name, fields.parameter_names)


def rank_and_scale(config: PeftConfig, name: str) -> tuple[int, float]:
    """The rank of the module or parameter `name`, and the factor of its B A."""
    fields = config.fields
    rank = int(_pattern_value(fields.ranks, fields.rank_pattern, name, fields.r))
    alpha = _pattern_value(fields.alphas, fields.alpha_pattern, name, fields.lora_alpha)
    return rank, config.scale(rank, alpha)


def _pattern_value(
    patterns: KeyPatterns, values: Mapping[str, float] | None, name: str, default: float
) -> float:
    """The value of the first key that matches `name` or its end as a regular expression."""
    found = patterns.value(name)
    return (values or {}).get(name, default) if found is None else found


def _is_excluded(fields: PeftFields, name: str) -> bool:
    if any(f".{saved}." in f".{name}." for saved in fields.modules_to_save or ()):
        return True
    excluded = fields.exclude_modules
    if not excluded:
        return False
    if fields.excluded_pattern is not None:
        return fields.excluded_pattern.fullmatch(name) is not None
    return name in fields.excluded_names or _has_end_in(name, fields.excluded_names)


def _has_end_in(name: str, keys: frozenset[str]) -> bool:
    """Whether what follows one of the dots of `name` is among `keys`, of which there may be thousands."""
    return any(name[dot.end() :] in keys for dot in re.finditer(r"\.", name))


def _in_layers(fields: PeftFields, name: str) -> bool:
    wanted = fields.layers_to_transform
    if wanted is None or wanted == []:
        return True
    # The first number is the layer's; a later one may be an expert's.
    patterns = fields.layer_patterns or (_ANY_LAYER,)
    found = next((found for pattern in patterns if (found := pattern.match(name)) is not None), None)
    layer = None if found is None else found["idx"]
    if layer is None:
        return False
    index = int(layer)
    return index == wanted if isinstance(wanted, int) else index in wanted

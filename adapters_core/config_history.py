"""What adapter_config.json said in earlier versions of mlx-lm, in today's terms.

| mlx-lm           | layers                | DoRA             | factor of B A                            |
|------------------|-----------------------|------------------|------------------------------------------|
| 0.6.0 to 0.14.1  | `lora_layers`         | `use_dora`       | `scale` times `alpha` / `rank`           |
| 0.14.2 to 0.18.2 | `lora_layers`         | `use_dora`       | `scale`; `alpha` is written and not used |
| 0.19.0 on        | `num_layers`          | `fine_tune_type` | `scale`; `alpha` is written to 0.22.2    |

From 0.19.0 to 0.21.4 every number of layers but a negative one meant all of them (`formats.mlx_targets`).
Knows no tensors and no model. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

__all__ = ["LAYERS_BEFORE", "MAX_SCALE", "Reading", "is_mlx", "read_today"]

LAYERS_BEFORE = "lora_layers"
MAX_SCALE = 1e6
_DEFAULT_SCALE = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """A config's fields in today's terms, and `notes` and `problems` of the translation, a sentence each."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def is_mlx(values: Mapping[str, Any]) -> bool:
    """Whether a config with `peft_type` is in mlx-lm's format: Unsloth's trainer on MLX writes both."""
    return "peft_type" not in values or "fine_tune_type" in values or "lora_parameters" in values


def read_today(values: Mapping[str, Any], scale: float | None = None) -> Reading:
    """`values` as today's mlx-lm would write them; `scale` stands in place of the file's."""
    today, problems = dict(values), []
    if LAYERS_BEFORE in today:
        layers = today.setdefault("num_layers", today[LAYERS_BEFORE])
        if layers != today[LAYERS_BEFORE]:
            problems.append(
                f"num_layers is {layers!r} and {LAYERS_BEFORE}, its older name, {today[LAYERS_BEFORE]!r}: "
                "expected one of them, or the same number"
            )
    if today.get("use_dora") is True and today.setdefault("fine_tune_type", "dora") != "dora":
        problems.append(
            f"use_dora is true and fine_tune_type {today['fine_tune_type']!r}: expected one of them, or "
            '"dora" beside true'
        )
    parameters = today.get("lora_parameters", {})
    if not isinstance(parameters, Mapping):
        return Reading(today, (), tuple(problems))
    if scale is None:
        return Reading(today, _doubts(today, parameters), tuple(problems))
    own = parameters.get("scale")
    today["lora_parameters"] = {
        **{name: value for name, value in parameters.items() if name != "alpha"},
        "scale": scale,
    }
    today.pop(LAYERS_BEFORE, None)
    is_other = not _is_number(own) or own != scale
    said = f"the {own:g} in it" if _is_number(own) else "one, which it lacks"
    note = f"The scale {scale:g} was given for this load, and stands in place of {said}."
    return Reading(today, (note,) if is_other else (), tuple(problems))


def _doubts(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """What the scale may have meant to the version that wrote the config, if that is not sure."""
    own, alpha, rank = (parameters.get(name) for name in ("scale", "alpha", "rank"))
    if own is None and alpha is None:
        return (
            f"lora_parameters has no scale, and {_DEFAULT_SCALE:g} is taken, which mlx-lm's trainer wrote up "
            "to 0.24; since 0.25 it writes 20. If another is right, load the adapter with it as its scale.",
        )
    if LAYERS_BEFORE not in values or not (_is_number(own) and _is_number(alpha)):
        return ()
    if not isinstance(rank, int) or rank < 1:
        return ()
    before = own * alpha / rank
    if math.isclose(before, own):
        return ()
    return (
        f"lora_parameters has scale {own:g} and alpha {alpha:g} at rank {rank}, which mlx-lm has read in two "
        f"ways: up to 0.14.1 as scale * alpha / rank = {before:g}, from 0.14.2 on as scale = {own:g}. "
        f"{own:g} is used.{_hint(values)} If it was trained with 0.14.1 or older, load it with the scale "
        f"{before:g}; with the scale {own:g} this warning goes.",
    )


def _hint(values: Mapping[str, Any]) -> str:
    """What the other fields of a trainer's config say of its version; nothing of one that was cut short."""
    if "use_dora" in values:
        return " The config has use_dora, which came with 0.14.0."
    if "adapter_path" in values and "iters" in values:
        return " The config lacks use_dora, which 0.14.0 and later wrote, so that it is likely older."
    return ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

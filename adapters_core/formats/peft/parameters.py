"""Weights of linear layers that PEFT adapts as parameters (target_parameters): routers, above all.

transformers 5 has routers as modules of their own kind, and PEFT 0.21 turns a target `gate` (also one of
"all-linear") into the parameter `gate.weight`. Its factors lie as a linear layer's do; its rank and alpha go
by the parameter's name (`ParamWrapper` in peft/tuners/lora/layer.py). Changes nothing.
"""

from __future__ import annotations

import re

from .config import PeftConfig
from .targets import is_target_parameter

__all__ = ["old_layout", "target_weight"]

_FIRST_VERSION = (0, 20)


def target_weight(config: PeftConfig, name: str) -> str | None:
    """The name of the weight of the module `name` if it is adapted as a parameter, else None."""
    weight = f"{name}.weight"
    return weight if is_target_parameter(config.fields, weight) else None


def old_layout(config: PeftConfig) -> str | None:
    """Why the layout of parameters is not known, None from PEFT 0.20 on."""
    version = re.match(r"(\d+)\.(\d+)", config.fields.peft_version or "")
    if version is not None and (int(version[1]), int(version[2])) >= _FIRST_VERSION:
        return None
    oldest = ".".join(map(str, _FIRST_VERSION))
    return (
        f"target_parameters were laid out in other ways before PEFT {oldest}, and peft_version is "
        f"{config.fields.peft_version!r}; train it, or convert it, with a newer PEFT"
    )

"""Weights of linear layers that PEFT adapts as parameters (target_parameters): routers, above all.

transformers 5 has routers as modules of their own kind, and PEFT 0.21 turns a target `gate` (also one of
"all-linear") into the parameter `gate.weight`. Its factors lie as a linear layer's do; its rank and alpha go
by the parameter's name (`ParamWrapper` in peft/tuners/lora/layer.py). Changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.nn as nn

from ...layers.modules import ModuleKind, kind_of
from .config import PeftConfig
from .targets import is_target_parameter

__all__ = ["SIBLINGS", "old_layout", "router_name", "router_place", "target_weight", "transposed_weights"]

# Where mlx-lm keeps the experts, and the router, of what transformers calls mlp.
SIBLINGS = ("block_sparse_moe", "mlp", "feed_forward")
_ROUTER = "gate"
_FIRST_VERSION = (0, 20)


def target_weight(config: PeftConfig, name: str) -> str | None:
    """The name of the weight of the module `name` if it is adapted as a parameter, else None."""
    weight = f"{name}.weight"
    return weight if is_target_parameter(config.fields, weight) else None


def router_place(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The path among `modules` of the router at `path` (as transformers has it), if it lies elsewhere."""
    block, _, name = path.rpartition(".")
    layer, _, parent = block.rpartition(".")
    if name != _ROUTER or parent not in SIBLINGS:
        return None
    places = (f"{layer}.{sibling}" for sibling in SIBLINGS)
    return next((f"{place}.{_ROUTER}" for place in places if _is_router(modules, place)), None)


def router_name(modules: Mapping[str, nn.Module], path: str) -> str:
    """What transformers calls the router at `path`; any other path as it is."""
    block, _, name = path.rpartition(".")
    layer, _, parent = block.rpartition(".")
    if name != _ROUTER or parent != SIBLINGS[0] or not _is_router(modules, block):
        return path
    return f"{layer}.mlp.{_ROUTER}"


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


def transposed_weights(model_type: str) -> str | None:
    """Why the factors of a linear layer's weight in such a model are not a linear layer's, else None."""
    if model_type != "gpt2":
        return None
    return "the weights of a gpt2 model lie transposed, and so would the factors; name it in target_modules"


def _is_router(modules: Mapping[str, nn.Module], block: str) -> bool:
    router, experts = modules.get(f"{block}.{_ROUTER}"), modules.get(f"{block}.switch_mlp.down_proj")
    if router is None or experts is None:
        return False
    return kind_of(router) is ModuleKind.LINEAR and kind_of(experts) is ModuleKind.SWITCH

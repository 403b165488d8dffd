"""Where the routers of experts lie in an MLX model, and what transformers calls them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn

from ...layers.modules import ModuleKind, kind_of

__all__ = ["SIBLINGS", "router_name", "router_place"]

# Where mlx-lm keeps the experts, and the router, of what transformers calls mlp.
SIBLINGS = ("block_sparse_moe", "mlp", "feed_forward")
_ROUTER = "gate"


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


def _is_router(modules: Mapping[str, nn.Module], block: str) -> bool:
    router, experts = modules.get(f"{block}.{_ROUTER}"), modules.get(f"{block}.switch_mlp.down_proj")
    if router is None or experts is None:
        return False
    return kind_of(router) is ModuleKind.LINEAR and kind_of(experts) is ModuleKind.SWITCH

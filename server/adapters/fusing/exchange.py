"""The exchange itself: the base's layers for fused ones, and back. Knows no names.

Everything here runs on the generation thread, with no request in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.nn as nn

from adapters_core.container import AdapterContainer
from adapters_core.layers.surgery import replace_modules
from adapters_core.mixed.residents import ResidentAdapter
from server.engine.context import ModelContext

__all__ = ["FusedLayers", "install", "take_out"]


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """Fused layers by path, `mark`, which tells a base with them from any other, and the adapter.

    That one comes back into the bank when they go; None for a sum.
    """

    modules: Mapping[str, nn.Module]
    adapter: AdapterContainer | None
    mark: str


def install(context: ModelContext, layers: FusedLayers) -> None:
    """Empty the bank and exchange the layers."""
    context.bank.close()
    context.fusion = replace_modules(context.model, layers.modules)
    context.fused_digest = layers.mark
    context.prompt_cache.clear()  # all of it was computed with the base as it was


def take_out(context: ModelContext, layers: FusedLayers) -> ResidentAdapter | None:
    """Undo `install` for the base and for an adapter fused alone; if this raises, all is as it was."""
    stale = context.cache_key(()).weights
    context.fusion.undo()
    try:
        resident = None if layers.adapter is None else context.bank.add(layers.adapter)
    except BaseException:
        context.fusion = replace_modules(context.model, layers.modules)
        raise
    context.fusion = None
    context.fused_digest = None
    context.prompt_cache.drop(lambda key: key.weights == stale)
    return resident

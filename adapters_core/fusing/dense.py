"""Stand-ins for quantised modules that dequantise their weight in each call, and drop it again.

On a CPU, MLX's product with a quantised weight takes a multiple of dequantising it and multiplying, when the
rows are tens of tokens: the same function, up to roundings of the sums. No model is ever dense as a whole.
Changes no model. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.modules import ModuleKind, dense_weight, is_quantized, kind_of
from ..layers.surgery import locate
from ..layers.targets import is_wrapper, named_base_modules

__all__ = ["dequantizing"]


class _Dequantizing(nn.Module):
    """A quantised linear layer or embedding, computed with its weight dequantised for the moment."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self["base"] = base

    def __call__(self, x: mx.array) -> Any:
        base: Any = self["base"]
        if kind_of(base) is ModuleKind.EMBEDDING:
            return base(x)
        y = self.as_linear(x)
        y = y if base.get("bias") is None else y + base.bias
        return mx.split(y, base["indices"], axis=-1) if kind_of(base) is ModuleKind.SPLIT else y

    def as_linear(self, x: mx.array) -> mx.array:
        """x (…, in) → (…, out), without the bias."""
        return x @ dense_weight(self["base"]).astype(x.dtype).T

    def __getattr__(self, key: str) -> Any:
        # Some models read sizes off their layers.
        return self[key] if key in self else getattr(self["base"], key)


def dequantizing(model: nn.Module, leave: Collection[str]) -> dict[str, nn.Module]:
    """Stand-ins by path for quantised linear layers and embeddings, but those at `leave` and inside wrappers.

    Empty on a GPU, whose own products are fast.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return {}
    kinds = (ModuleKind.LINEAR, ModuleKind.SPLIT, ModuleKind.EMBEDDING)
    return {
        path: _Dequantizing(module)
        for path, module in named_base_modules(model)
        if path not in leave
        and is_quantized(module)
        and kind_of(module) in kinds
        and not is_wrapper(locate(model, path)[2])
    }

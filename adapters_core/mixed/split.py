"""Split layers that serve rows with different adapters, and with none, in one forward.

Before its output is divided, such a layer is a linear one, and the LoRAs of its outputs are one LoRA, whose B
is block diagonal (`ModuleWeights.of_parts`). So it is served as any linear layer, and what comes out is
divided. With n outputs, B takes n times the memory that it takes in the file, A takes no more. Runs on the
thread that owns the model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.split import undivided
from .linear import MixedLinear, ProjectionGroup

__all__ = ["MixedSplitLinear"]


class MixedSplitLinear(nn.Module):
    """A split layer beside the factors of every resident adapter that adapts it.

    Forward: x as for `MixedLinear` → its outputs, each in the form of `MixedLinear`'s.
    """

    linear: Any

    def __init__(self, path: str, linear: nn.Module, group: ProjectionGroup) -> None:
        super().__init__()
        self.linear = linear
        # Kept by its method, so that the model's tree has the base once.
        self._whole = MixedLinear(path, undivided(linear), group).__call__

    def reverted(self) -> nn.Module:
        """The base layer, the very module that was wrapped."""
        return self.linear

    def __call__(self, x: mx.array) -> Any:
        return mx.split(self._whole(x), self.linear["indices"], axis=-1)

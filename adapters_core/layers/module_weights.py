"""What an adapter brings to one module, whatever file it came from. Knows no files and no model."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

__all__ = ["ModuleWeights"]


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """The factors in mlx-lm's orientation, and the scale s of their product.

    | module     | lora_a              | lora_b            | magnitude         |
    |------------|---------------------|-------------------|-------------------|
    | linear     | (in, r)             | (r, out)          | (out,)            |
    | embedding  | (num_embeddings, r) | (r, dims)         | (num_embeddings,) |
    | switch     | (experts, r, in)    | (experts, out, r) | -                 |

    `magnitude` is there for DoRA. `bias` (out,) adds to B A x before the scale, where the adapter has one.
    `lookup_only` is for embeddings: a head that is tied to it stays the base's, as PEFT leaves it.
    """

    lora_a: mx.array
    lora_b: mx.array
    magnitude: mx.array | None
    scale: float
    bias: mx.array | None = None
    lookup_only: bool = False

    @property
    def rank(self) -> int:
        """r, of each expert's factors for a switch."""
        return self.lora_b.shape[-1] if self.lora_b.ndim == 3 else self.lora_b.shape[0]

"""What an adapter brings to one module, whatever file it came from. Knows no files and no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import mlx.core as mx

__all__ = ["ModuleWeights"]


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """The factors in mlx-lm's orientation, and the scale s of their product.

    | module     | lora_a              | lora_b            | magnitude         |
    |------------|---------------------|-------------------|-------------------|
    | linear     | (in, r)             | (r, out)          | (out,)            |
    | split      | (in, r)             | (r, out)          | -                 |
    | embedding  | (num_embeddings, r) | (r, dims)         | (num_embeddings,) |
    | switch     | (experts, r, in)    | (experts, out, r) | -                 |

    `magnitude` is there for DoRA. `bias` (out,) adds to B A x before the scale, where the adapter has one.
    `lookup_only` is for embeddings: a head that is tied to it stays the base's, as PEFT leaves it. So is
    `head_only`: the head has the factors, and look-ups stay the base's. So is
    `by_feature`: `magnitude` is (dims,), one for each column of the weight, as PEFT has it. `parts` are what
    the factors were made of, if each output of a split layer has its own: (in, r) and (r, outᵢ).
    """

    lora_a: mx.array
    lora_b: mx.array
    magnitude: mx.array | None
    scale: float
    bias: mx.array | None = None
    lookup_only: bool = False
    by_feature: bool = False
    parts: tuple[tuple[mx.array, mx.array], ...] = ()
    head_only: bool = False

    @classmethod
    def of_parts(
        cls, parts: Iterable[tuple[mx.array, mx.array]], scale: float, bias: mx.array | None = None
    ) -> Self:
        """LoRAs of the n slices of one output as the single one that they are, of rank n·r; not evaluated.

        Its A is all A side by side, its B block diagonal, so that it takes n times what the parts' B do.
        """
        parts = tuple(parts)
        ends = list(accumulate(b.shape[1] for _, b in parts))
        blocks = [
            mx.pad(b, [(0, 0), (end - b.shape[1], ends[-1] - end)])
            for (_, b), end in zip(parts, ends, strict=True)
        ]
        lora_a = mx.concatenate([a for a, _ in parts], axis=1)
        return cls(lora_a, mx.concatenate(blocks), None, scale, bias, parts=parts)

    def divided(self, sizes: Sequence[int]) -> tuple[tuple[mx.array, mx.array], ...]:
        """Factors for each output of a split layer, of these `sizes`: the parts, else A and a slice of B."""
        if self.parts:
            return self.parts
        return tuple((self.lora_a, b) for b in mx.split(self.lora_b, list(accumulate(sizes))[:-1], axis=1))

    @property
    def rank(self) -> int:
        """r, of each expert's factors for a switch."""
        return self.lora_b.shape[-1] if self.lora_b.ndim == 3 else self.lora_b.shape[0]

    @property
    def file_rank(self) -> int:
        """The rank as files say it, which is that of each part where there are parts."""
        return max((b.shape[0] for _, b in self.parts), default=self.rank)

    @property
    def pairs(self) -> tuple[tuple[mx.array, mx.array], ...]:
        """A and B, of each part where there are parts."""
        return self.parts or ((self.lora_a, self.lora_b),)

    @property
    def arrays(self) -> tuple[mx.array | None, ...]:
        """What it is made of: the parts or the factors, the magnitude and the bias."""
        return (*(factor for pair in self.pairs for factor in pair), self.magnitude, self.bias)

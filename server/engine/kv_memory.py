"""What the KV caches of running requests take, within a limit. Holds numbers alone; generation thread.

Rows of a batch are as long as the longest of them, in steps of 256 tokens, and while the caches grow, the
old ones are there beside the new ones: so a batch takes twice rows x longest x bytes of a token. Reading a
prompt takes memory of its own, mostly for the attention's scores where no fused kernel computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .cache_kinds import parts

__all__ = ["KvMemory", "KvSizes"]

# The part of the limit that is left for computing: scores, activations, logits.
_WORKSPACE_SHARE = 4
_GROWTH = 2
# How many activations of the widest layer are there at once.
_ACTIVATIONS = 6
# Logits, their log-softmax, and a copy.
_LOGITS = 3
_FLOAT_BYTES = 4
_STEP_TOKENS = 256
_LINEAR = (nn.Linear, nn.QuantizedLinear)


@dataclass(frozen=True, slots=True)
class KvSizes:
    """What one row's KV caches take, and what computing takes for each token; in bytes.

    `growing` are (bytes of a token, most tokens or None) for each kind of cache, `row_bytes` what does not
    depend on the length. `score_bytes` are for each token that is read and each that it attends to;
    `token_bytes` for each that is read, `logit_bytes` for each that is scored.
    """

    growing: tuple[tuple[int, int | None], ...] = ()
    row_bytes: int = 0
    score_bytes: int = 0
    token_bytes: int = 0
    logit_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> KvSizes:
        """Measured on a forward of one token, which is laid out and never computed."""
        caches = make_prompt_cache(model)
        logits = model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        growing: dict[int | None, int] = {}
        row_bytes = 0
        for part in parts(caches):
            tokens = _held_tokens(part)
            if tokens:
                most = getattr(part, "max_size", None) or getattr(part, "chunk_size", None)
                growing[most] = growing.get(most, 0) + part.nbytes // tokens
            else:
                row_bytes += part.nbytes
        vocabulary = logits.shape[-1]
        outputs = [one.weight.shape[0] for _, one in model.named_modules() if isinstance(one, _LINEAR)]
        widest = max((size for size in outputs if size != vocabulary), default=0)
        # Elsewhere than on Metal, the scores of attention to a prompt are held as a whole.
        holds_scores = mx.default_device().type == mx.DeviceType.cpu or mx.cuda.is_available()
        return cls(
            tuple((size, most) for most, size in growing.items()),
            row_bytes,
            2 * _FLOAT_BYTES * _heads(model) if holds_scores else 0,
            _ACTIVATIONS * _FLOAT_BYTES * widest,
            _LOGITS * _FLOAT_BYTES * vocabulary,
        )

    def row(self, tokens: int) -> int:
        """Bytes of one row of so many tokens."""
        tokens = -(-tokens // _STEP_TOKENS) * _STEP_TOKENS
        return self.row_bytes + sum(
            size * (tokens if most is None else min(tokens, most)) for size, most in self.growing
        )


@dataclass(slots=True)
class KvMemory:
    """`limit_bytes` for the rows of running requests, for computing them, and for kept prompts; None: any."""

    sizes: KvSizes = field(default_factory=KvSizes)
    limit_bytes: int | None = None

    def needed_bytes(self, rows: int, longest_tokens: int) -> int:
        """What rows of a batch may come to take, the longest of them having so many tokens at its end."""
        return _GROWTH * rows * self.sizes.row(longest_tokens)

    @property
    def rows_bytes(self) -> int | None:
        """What of the limit is for rows; None: any."""
        return None if self.limit_bytes is None else self.limit_bytes - self.limit_bytes // _WORKSPACE_SHARE

    def fits(self, rows: int, longest_tokens: int) -> bool:
        """Whether such rows may be computed together."""
        rows_bytes = self.rows_bytes
        return rows_bytes is None or self.needed_bytes(rows, longest_tokens) <= rows_bytes

    def most_read_tokens(self, longest: int) -> int | None:
        """How many tokens of all prompts may be read in a step beside a row of `longest`; at least 1."""
        return self._most(self.sizes.token_bytes + self.sizes.score_bytes * longest)

    def most_scored_tokens(self, longest: int) -> int | None:
        """The same of tokens that are scored, the logits of which are there at once."""
        sizes = self.sizes
        return self._most(sizes.token_bytes + sizes.score_bytes * longest + sizes.logit_bytes)

    def _most(self, bytes_of_token: int) -> int | None:
        if self.limit_bytes is None or bytes_of_token == 0:
            return None
        return max(1, self.limit_bytes // _WORKSPACE_SHARE // bytes_of_token)


def _held_tokens(part: Any) -> int:
    """For how many tokens a cache has room; 0 if what it takes does not depend on them."""
    keys = getattr(part, "keys", None)
    return keys.shape[-2] if isinstance(keys, mx.array) else 0


def _heads(model: nn.Module) -> int:
    """Attention heads as the model's arguments tell them; else as many as large models have."""
    args = getattr(model, "args", None)
    for one in (args, getattr(args, "text_config", None)):
        told = (
            one.get("num_attention_heads")
            if isinstance(one, dict)
            else getattr(one, "num_attention_heads", None)
        )
        if isinstance(told, int) and told > 0:
            return told
    return 32

"""What a module of a transformers model is called where mlx-lm takes weights in, and the other way round.

Most have the same name in both. Those that differ, differ by a prefix: a language model inside of a
multimodal one, a bare decoder. Which rule an adapter follows is seen from its own tensors. What mlx-lm itself
renames is not said here (`arrivals`). Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["PathRule", "any_layer", "rules_of", "transformers_name"]


@dataclass(frozen=True, slots=True)
class PathRule:
    """Pairs of a prefix in the transformers model and in what mlx-lm takes in; the first match holds.

    `parts` are pairs of what follows it, of which the first that is there is replaced.
    """

    prefixes: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...] = ()

    def to_mlx(self, path: str) -> str | None:
        """The name that mlx-lm takes in, or None where the rule says nothing."""
        moved = _moved(path, self.prefixes)
        return None if moved is None else _replaced(moved, self.parts)

    def to_peft(self, path: str) -> str | None:
        """The path in the transformers model, or None where the rule says nothing."""
        parts, prefixes = (tuple((mlx, peft) for peft, mlx in pairs) for pairs in (self.parts, self.prefixes))
        return _moved(_replaced(path, parts), prefixes)


_PLAIN = (("", ""),)
_RULES = (
    PathRule(_PLAIN),
    # transformers 5: the language model of a multimodal one, to mlx-lm's wrapper, or to its text model
    PathRule((("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))),
    PathRule((("model.language_model.", "model."), ("lm_head", "lm_head"))),
    # transformers 4: the same
    PathRule((("language_model.model.", "model."), ("language_model.lm_head", "lm_head"))),
    PathRule((("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))),
    # GPT-NeoX's head has its old name in checkpoints
    PathRule((("lm_head", "embed_out"), ("", ""))),
    # checkpoints of GPT-2
    PathRule((("transformer.", ""), ("lm_head", "lm_head"))),
    # an adapter that was trained on the decoder alone
    PathRule((("", "model."),)),
)


# What transformers 5 calls otherwise than checkpoints do, by the model's type.
_OWN_RULES = {
    "bailing_hybrid": PathRule(
        (("model.embed_tokens", "model.word_embeddings"), *_PLAIN),
        (
            (".self_attn.o_proj", ".attention.dense"),
            (".self_attn.forget_gate.", ".attention."),
            (".self_attn.", ".attention."),
        ),
    ),
    "exaone": PathRule(
        (("model.embed_tokens", "transformer.wte"), ("model.layers.", "transformer.h."), *_PLAIN),
        (
            (".self_attn.o_proj", ".attn.attention.out_proj"),
            (".self_attn.", ".attn.attention."),
            (".mlp.gate_proj", ".mlp.c_fc_0"),
            (".mlp.up_proj", ".mlp.c_fc_1"),
            (".mlp.down_proj", ".mlp.c_proj"),
        ),
    ),
    "kimi_linear": PathRule(_PLAIN, ((".forget_gate.", "."),)),
    "laguna": PathRule(_PLAIN, ((".shared_experts.", ".shared_expert."),)),
    "minimax_m3_vl": PathRule(
        (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
        ((".mlp.shared_experts.", ".block_sparse_moe.shared_experts."),),
    ),
    "nemotron_h": PathRule((("model.", "backbone."), *_PLAIN)),
    "phimoe": PathRule(_PLAIN, ((".mlp.router", ".block_sparse_moe.gate"),)),
}


def rules_of(model_type: str) -> tuple[PathRule, ...]:
    """The rules that an adapter for a model of this type may follow, the plainest first."""
    own = _OWN_RULES.get(model_type)
    return _RULES if own is None else (_RULES[0], own, *_RULES[1:])


# Prefixes in MLX models, and in transformers 5, where mlx-lm renames what checkpoints have.
_NAMES = {
    "gpt2": (("model.", "transformer."),),
    "gpt_neox": (("model.h.", "gpt_neox.layers."), ("model.embed_out", "lm_head"), ("model.", "gpt_neox.")),
    "gptj": (("model.", "transformer."),),
}


def transformers_name(model_type: str, path: str) -> str:
    """What transformers calls the module at `path` of an MLX model of this type."""
    return _moved(path, _NAMES.get(model_type, ())) or path


def any_layer(path: str) -> str:
    """`path` with a star for each number: what modules of the same kind in all layers have in common."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _replaced(path: str, parts: Collection[tuple[str, str]]) -> str:
    return next((path.replace(old, new, 1) for old, new in parts if old in path), path)


def _moved(path: str, prefixes: Collection[tuple[str, str]]) -> str | None:
    for old, new in prefixes:
        if path.startswith(old) and (not old or old.endswith(".") or path == old):
            return new + path[len(old) :]
    return None

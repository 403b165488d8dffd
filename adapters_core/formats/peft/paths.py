"""What a module of a transformers model is called where mlx-lm takes weights in, and the other way round.

Most have the same name in both. Those that differ, differ by a prefix: a language model inside of a
multimodal one, a bare decoder. Which rule an adapter follows is seen from its own tensors. What mlx-lm itself
renames is not said here (`arrivals`). Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["RULES", "PathRule", "any_layer", "transformers_name"]


@dataclass(frozen=True, slots=True)
class PathRule:
    """Pairs of a prefix in the transformers model and in what mlx-lm takes in; the first match holds."""

    prefixes: tuple[tuple[str, str], ...]

    def to_mlx(self, path: str) -> str | None:
        """The name that mlx-lm takes in, or None where the rule says nothing."""
        return _moved(path, self.prefixes)

    def to_peft(self, path: str) -> str | None:
        """The path in the transformers model, or None where the rule says nothing."""
        return _moved(path, tuple((mlx, peft) for peft, mlx in self.prefixes))


RULES = (
    PathRule((("", ""),)),
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


def _moved(path: str, prefixes: Collection[tuple[str, str]]) -> str | None:
    for old, new in prefixes:
        if path.startswith(old) and (not old or old.endswith(".") or path == old):
            return new + path[len(old) :]
    return None

"""Where a module of a transformers model lies in the MLX model, and the other way round.

Most models have the same paths in both. Those that differ, differ by a prefix: a language model inside of a
multimodal one, a bare decoder, or an older architecture's name for it. Which rule an adapter follows is
seen from its own tensors. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

__all__ = ["IDENTITY", "PathRule", "any_layer", "find_rule"]


@dataclass(frozen=True, slots=True)
class PathRule:
    """Pairs of a prefix in the transformers model and its place in the MLX model; the first match holds."""

    prefixes: tuple[tuple[str, str], ...]

    def to_mlx(self, path: str) -> str | None:
        """The path in the MLX model, or None where the rule says nothing."""
        return _moved(path, self.prefixes)

    def to_peft(self, path: str) -> str | None:
        """The path in the transformers model, or None where the rule says nothing."""
        return _moved(path, tuple((mlx, peft) for peft, mlx in self.prefixes))


IDENTITY = PathRule((("", ""),))
_RULES = (
    IDENTITY,
    # transformers 5: the language model of a multimodal one, to mlx-lm's wrapper, or to its text model
    PathRule((("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))),
    PathRule((("model.language_model.", "model."), ("lm_head", "lm_head"))),
    # transformers 4: the same
    PathRule((("language_model.model.", "model."), ("language_model.lm_head", "lm_head"))),
    PathRule((("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))),
    PathRule((("transformer.", "model."), ("lm_head", "lm_head"))),
    PathRule((("gpt_neox.", "model."), ("embed_out", "embed_out"))),
    # an adapter that was trained on the decoder alone
    PathRule((("", "model."),)),
)


def find_rule(paths: Iterable[str], exists: Callable[[str], bool]) -> PathRule:
    """The rule under which most of an adapter's `paths` exist in the MLX model; the plainest of equals."""
    paths = list(paths)

    def hits(rule: PathRule) -> int:
        return sum((mlx := rule.to_mlx(path)) is not None and exists(mlx) for path in paths)

    return max(_RULES, key=hits)


def any_layer(path: str) -> str:
    """`path` with a star for each number: what modules of the same kind in all layers have in common."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _moved(path: str, prefixes: Collection[tuple[str, str]]) -> str | None:
    for old, new in prefixes:
        if path.startswith(old) and (not old or old.endswith(".") or path == old):
            return new + path[len(old) :]
    return None

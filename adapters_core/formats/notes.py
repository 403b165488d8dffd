"""What is worth knowing of an adapter that is written in a format, though nothing of it is lost. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ..layers.module_weights import ModuleWeights
from .protocol import FormatName

__all__ = ["writing_notes"]

# As transformers has them too, for nearly all models.
_COMMON_NAMES = ("model.layers.", "model.embed_tokens", "lm_head")


def writing_notes(weights: Mapping[str, ModuleWeights], to: FormatName) -> list[str]:
    """A sentence each, on `weights`, by full path in the model, in the format `to`."""
    return _changed_factors(weights) if to == "mlx" else _uncommon_names(weights)


def _changed_factors(weights: Mapping[str, ModuleWeights]) -> list[str]:
    """What mlx-lm's format, with its one rank and scale, makes of modules that differ in them."""
    ranks = sorted({module.file_rank for module in weights.values()})
    scales = sorted({module.scale for module in weights.values()})
    notes = []
    if len(ranks) > 1:
        notes.append(f"Ranks differ ({', '.join(map(str, ranks))}): zeros fill factors up to {ranks[-1]}.")
    if len(scales) > 1:
        shown = ", ".join(f"{scale:.6g}" for scale in scales)
        notes.append(
            f"Scales differ ({shown}): they have gone into B, in float32 where the ratio is no power of two."
        )
    return notes


def _uncommon_names(weights: Mapping[str, ModuleWeights]) -> list[str]:
    """Whether transformers may name modules otherwise than the MLX model does."""
    others = [path for path in weights if not path.startswith(_COMMON_NAMES)]
    if not others:
        return []
    return [
        f"{len(others)} module(s), such as {min(others)}, are named as in the MLX model; transformers may "
        "name them otherwise, and PEFT would not find them then."
    ]

"""Whether PEFT gives a head what it gives the embedding.

As in PEFT 0.21: `_check_tied_modules` (peft/tuners/tuners_utils.py), which goes by names alone, and only by
those of `EMBEDDING_LAYER_NAMES`. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable

from .config import PeftFields

__all__ = ["TIED_NAMES", "saved_are_tied", "targets_are_tied"]

# PEFT's EMBEDDING_LAYER_NAMES.
TIED_NAMES = ("embed_tokens", "lm_head")


def saved_are_tied(fields: PeftFields) -> bool:
    """Whether the head has the weight of an embedding that is saved whole."""
    return bool(fields.ensure_weight_tying) and _has_tied_name(fields.modules_to_save or ())


def targets_are_tied(fields: PeftFields) -> bool:
    """Whether the head has the factors of an embedding that is a target: if either is named as PEFT asks.

    An expression has to match the bare name; what is saved whole goes before what is a target.
    """
    if not fields.ensure_weight_tying or saved_are_tied(fields):
        return False
    if fields.target_pattern is not None:
        return any(fields.target_pattern.fullmatch(name) is not None for name in TIED_NAMES)
    return _has_tied_name(fields.target_names)


def _has_tied_name(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in TIED_NAMES for name in names)

"""Names in requests: which known name a misspelt one stands for, whether one speaks of adapters. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["named", "nearest", "speaks_of_adapters"]

# One wrong letter in ten: 'steam' is near 'stream'; 'mode' is not near 'model', nor 'user_id' near 'user'.
_LEAST_RATIO = 0.9
_MAX_CHARS = 64
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_OWN_CASE = re.compile("Q?LoRA|DoRA")
_ADAPTER_WORDS = ("adapter", "lora", "qlora", "dora", "peft")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is nearly: but for case and separators, or for a wrong letter.

    >>> nearest("maxTokens", ["max_tokens"]), nearest("temprature", ["temperature"]), nearest("tag", ["n"])
    ('max_tokens', 'temperature', None)
    """
    if len(name) > _MAX_CHARS:
        return None
    given, best, best_ratio = _letters(name), None, 0.0
    for candidate in sorted(known):
        ratio = _likeness(given, _letters(candidate))
        if ratio > best_ratio:
            best, best_ratio = candidate, ratio
    return best if best_ratio >= _LEAST_RATIO else None


def speaks_of_adapters(name: str) -> bool:
    """Whether a word of `name` is about adapters: `loraPath`, `X-Adapter-Id`; `exploration` is not."""
    words = _WORD.findall(_OWN_CASE.sub(lambda match: match[0].capitalize(), name[:_MAX_CHARS]))
    return any(word.lower().startswith(_ADAPTER_WORDS) for word in words)


def named(name: str) -> str:
    """A name as messages show it."""
    return repr(name if len(name) <= _MAX_CHARS else f"{name[:_MAX_CHARS]}…")


def _letters(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum())


def _likeness(given: str, known: str) -> float:
    """1 for equal ones, 0 for unlike ones. Two letters that changed places count as one wrong one."""
    if given == known:
        return 1.0
    if abs(len(given) - len(known)) > 2 or min(len(given), len(known)) < 4 or given[0] != known[0]:
        return 0.0
    if sorted(given) == sorted(known):
        return 0.95
    return SequenceMatcher(None, given, known, autojunk=False).ratio()

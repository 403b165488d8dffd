"""Makes text from elsewhere safe to print: it stays one line, drives no terminal, and reads as what it is.

Knows nothing of logs or terminals. Pure; any thread.
"""

from __future__ import annotations

import unicodedata

__all__ = ["escape_controls"]

# Cc: control characters (CR, LF, ESC …); Zl, Zp: Unicode's own line and paragraph separators; Cf: what
# cannot be seen, and reorders or hides what can; Cs: lone surrogates, which no encoding can write.
_DRIVING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# The joiners, which Persian, Indic scripts and emoji are written with; they reorder nothing.
_HARMLESS = "\u200c\u200d"


def escape_controls(text: str, *, keep: str = "") -> str:
    """`text` with what drives, splits, reorders or hides text as backslash escapes; `keep` stays as it is."""
    if text.isprintable():
        return text
    kept = keep + _HARMLESS
    return "".join(
        repr(char)[1:-1] if char not in kept and unicodedata.category(char) in _DRIVING else char
        for char in text
    )

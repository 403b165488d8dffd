"""Makes text from elsewhere safe to print: one line stays one line, and no terminal is driven by it.

Knows nothing of logs or terminals. Pure; any thread.
"""

from __future__ import annotations

import unicodedata

__all__ = ["escape_controls"]

# Cc: control characters (CR, LF, ESC …); Zl, Zp: Unicode's own line and paragraph separators.
_DRIVING = frozenset({"Cc", "Zl", "Zp"})


def escape_controls(text: str, *, keep: str = "") -> str:
    """`text` with every control character and line separator, but those in `keep`, as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in _DRIVING and char not in keep else char
        for char in text
    )

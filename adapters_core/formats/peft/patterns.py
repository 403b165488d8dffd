"""Regular expressions from outside: matched by RE2, in time linear in the text whatever the expression is.

Python's `re` backtracks, holds the interpreter while it does, and cannot be stopped. PEFT uses `re`: an
expression that RE2 lacks (look-around, backreferences), or reads in another way, is refused. Which modules
one with look-around chooses is told by a file's tensors (`targets.named_by_tensors`). Any thread.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import re2

__all__ = ["MAX_KEYS", "KeyPatterns", "LookAroundError", "Pattern", "PatternError", "compiled"]

_MAX_LENGTH = 4096
MAX_KEYS = 2048
_MAX_MEMORY_BYTES = 1 << 17  # of one expression; the program of the longest one fits
# What both accept and read in different ways: an omitted minimum, and POSIX classes.
_AMBIGUOUS = re.compile(r"\{,\d*\}|\[:")
_LOOK_AROUND = re.compile(r"(?<!\\)(?:\\\\)*\(\?(?:[=!]|<[=!])")
_LITERAL = string.ascii_letters + string.digits + "_"


class Pattern(Protocol):
    """A compiled expression; a match has its groups by name."""

    def match(self, text: str) -> Mapping[str, str | None] | None:
        """A match that begins where `text` does."""
        ...

    def fullmatch(self, text: str) -> Mapping[str, str | None] | None:
        """A match of all of `text`."""
        ...


class PatternError(ValueError):
    """An expression that cannot be used; the message says why."""


class LookAroundError(PatternError):
    """An expression with look-around, which is all that is wrong with it."""


def compiled(pattern: str, frame: str = "{}", *, captures: bool = False) -> Pattern:
    """`pattern`, put into `frame` at {}. Without `captures`, a match has no groups and takes less time.

    Raises:
        PatternError: it is none, is too long, or RE2 does not have what it uses; LookAroundError for that.
    """
    if len(pattern) > _MAX_LENGTH:
        raise PatternError(f"expected a regular expression of at most {_MAX_LENGTH} characters")
    framed = frame.replace("{}", pattern)
    if found := _AMBIGUOUS.search(pattern):
        raise PatternError(
            f"the regular expression {pattern[:80]!r} has {found[0]!r}, which engines differ in"
        )
    try:
        re.compile(framed)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"expected a regular expression, got {pattern[:80]!r} ({error})") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_MEMORY_BYTES
    options.never_capture = not captures
    try:
        return cast(Pattern, re2.compile(framed, options))
    except re2.error as error:
        kind = LookAroundError if _LOOK_AROUND.search(pattern) else PatternError
        raise kind(
            f"the regular expression {pattern[:80]!r} uses what RE2 does not have, such as look-around, a "
            f"backreference or a thousand repetitions ({_text(error)}), so that it takes linear time"
        ) from None


@dataclass(frozen=True, slots=True)
class KeyPatterns:
    """Values by expression; the first that matches decides. `problems` are those of the other keys.

    Each entry has how the texts end that its expression can match, which is quickly seen.
    """

    entries: tuple[tuple[str, Pattern, float], ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, float], frame: str) -> KeyPatterns:
        """Compile all keys, each in `frame`, whose end has to be the text's."""
        if len(values) > MAX_KEYS:
            return cls((), (f"expected at most {MAX_KEYS} names or regular expressions, got {len(values)}",))
        entries, problems = [], []
        for key, value in values.items():
            try:
                entries.append((_end_of(key), compiled(key, frame), value))
            except PatternError as error:
                problems.append(str(error))
        return cls(tuple(entries), tuple(problems))

    def value(self, text: str) -> float | None:
        """The value of the first key that matches `text`, or None."""
        for end, pattern, value in self.entries:
            if text.endswith(end) and pattern.match(text) is not None:
                return value
        return None


def _end_of(key: str) -> str:
    """Literal characters with which every match of `key` ends, "" where that is not plain to see."""
    before = key.rstrip(_LITERAL)
    is_plain = "|" not in key and "(?" not in key and not before.endswith("\\")
    return key[len(before) :] if is_plain else ""


def _text(error: Any) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)

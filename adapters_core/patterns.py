"""Regular expressions from outside, and whether they can be used without harm.

Python's `re` backtracks and cannot be stopped, so an expression with repetitions inside of repetitions,
or with too many of them, could hold a thread for ever on a module's name of usual length. Runs on any thread.
"""

from __future__ import annotations

import re

__all__ = ["pattern_problem"]

_MAX_REPETITIONS = 6
_REPEAT = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_OPENING = re.compile(r"\((?:\?(?:P<\w+>|<?[=!]|[aiLmsux-]*:|>|[aiLmsux]+|P=\w+|#[^)]*))?")
_BOUNDED_AT = 16


def pattern_problem(pattern: str, frame: str = "{}") -> str | None:
    """Why `pattern`, which is put into `frame` at {}, cannot be used as a regular expression, or None."""
    try:
        re.compile(frame.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        return f"expected a regular expression, got {pattern[:80]!r} ({error})"
    nested, total = _repetitions(pattern)
    if nested or total > _MAX_REPETITIONS:
        return (
            f"the regular expression {pattern[:80]!r} repeats a group that holds choices or repetitions, or "
            f"has more than {_MAX_REPETITIONS} open-ended repetitions; matching it may never end"
        )
    return None


def _repetitions(pattern: str) -> tuple[bool, int]:
    """Whether an open-ended repetition holds choices or repetitions, and how many of them there are."""
    groups = [False]  # for each open group: does it hold a choice or a repetition?
    closed = nested = False
    total = at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at, closed = at + 2, False
        elif character == "[":
            found = _CLASS.match(pattern, at)
            at, closed = found.end() if found else at + 1, False
        elif character == "(":
            groups.append(False)
            found = _OPENING.match(pattern, at)
            at, closed = found.end() if found else at + 1, False
        elif character == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] = groups[-1] or closed
            at += 1
        elif (found := _REPEAT.match(pattern, at)) is not None:
            if _is_unbounded(found):
                nested = nested or closed
                total += 1
            groups[-1] = True
            at, closed = found.end() + (pattern[found.end() : found.end() + 1] in ("?", "+")), False
        else:
            groups[-1] = groups[-1] or character == "|"
            at, closed = at + 1, False
    return nested, total


def _is_unbounded(repeat: re.Match[str]) -> bool:
    text = repeat.group()
    if text in "*+?":
        return text != "?"
    low, comma, high = repeat.groups()
    if not (low or high):
        return False  # "{}" and "{,}" stand for themselves or are checked by the compiler
    largest = high or ("" if comma else low)
    return not largest or int(largest) > _BOUNDED_AT

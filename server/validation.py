"""What is wrong with a request, in sentences: from pydantic's problems to message, parameter and code.

A message says what was expected and what came, and never repeats more than a few characters of the
input. Knows nothing of HTTP. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["UNKNOWN", "UNSUPPORTED", "describe", "describe_problems", "parameter_path"]

# Problems of these types become the error codes of the same names.
UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_parameter"

_AFTER_VALIDATION = re.compile(" after validation, not .*")
_SHOWN_PROBLEMS = 3
_SHOWN_CHARS = 60
_SHOWN_NAME_CHARS = 64

Problem = Mapping[str, Any]


def describe_problems(problems: Sequence[Problem], body: Any) -> tuple[str, str | None, str | None]:
    """(message, param, code) for what pydantic found; `param` and `code` are those of the first problem."""
    if isinstance(body, bytes):
        return "Expected a JSON body with the header 'Content-Type: application/json'.", None, None
    shown = [_sentence(problem) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(f"And {len(problems) - _SHOWN_PROBLEMS} more problems.")
    first = problems[0]
    code = UNKNOWN if first["type"] == "extra_forbidden" else first["type"]
    code = code if code in (UNKNOWN, UNSUPPORTED) else None
    return " ".join(shown), _param(first), code


def parameter_path(location: Sequence[int | str]) -> str | None:
    """`("body", "messages", 0, "content")` as `messages[0].content`; None for the body as a whole.

    Names in brackets are branches of a union or pydantic's mark for a key, not parts of the path.
    """
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("<", "[")):
            path += ("." if path else "") + _cut(part, _SHOWN_NAME_CHARS)
    return path or None


def describe(value: Any) -> str:
    """What came, in a few words: scalars cut to a few characters, lists by their length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(_cut(value, _SHOWN_CHARS))
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARS:
        return "a number with too many digits"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return "something else"


def _param(problem: Problem) -> str | None:
    path = parameter_path(problem["loc"])
    inner = problem.get("ctx", {}).get("param")
    return ".".join(part for part in (path, inner and _cut(inner, _SHOWN_NAME_CHARS)) if part) or None


def _sentence(problem: Problem) -> str:
    kind, message = problem["type"], str(problem["msg"])
    name = _param(problem)
    subject = "The body" if name is None else f"'{name}'"
    if kind in (UNKNOWN, UNSUPPORTED):
        path = parameter_path(problem["loc"])
        return message if path is None else f"In '{path}': {message}"
    if kind == "json_invalid":
        return f"The body is not valid JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}."
    if kind == "missing":
        return "A JSON body is required." if name is None else f"{subject} is required."
    if kind == "extra_forbidden":
        return f"{subject} is not a field of this call."
    if kind == "model_attributes_type":
        message = "Input should be a JSON object"
    for start in ("Input ", "Value "):
        message = message.removeprefix(start)
    message = message.removeprefix("error, ")
    if message.startswith(("String ", "List ", "Dictionary ")):
        message = message.split(" ", 1)[1]
    message = _AFTER_VALIDATION.sub("", message)
    if "param" in problem.get("ctx", {}):  # the input is the whole object that the parameter is in
        return f"{subject} {message}."
    return f"{subject} {message}, but is {describe(problem.get('input'))}."


def _cut(text: str, limit_chars: int) -> str:
    return text if len(text) <= limit_chars else f"{text[:limit_chars]}…"

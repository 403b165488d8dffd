"""The parameters of the JSON objects that clients send: what this server does with those it has no field for.

Reads parameters.toml, which says how each is treated. Knows no wire model: a model says which fields it has.
Pure but for reading that file.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal

from server.near import named, nearest, speaks_of_adapters

__all__ = ["ANYTHING", "Parameter", "Problems", "Vocabulary", "vocabulary"]

Call = Literal["chat", "completions"]

# More unknown fields than any client sends; each is compared with every known name.
_MAX_UNKNOWN = 32
_MAX_DEPTH = 2
# Short names of other servers' parameters are near to too many words.
_LEAST_CHARS_OF_OTHERS = 8
_SHOWN = 8
_SHOWN_HARMLESS_CHARS = 40


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of someone's API; the fields are explained in parameters.toml."""

    sources: tuple[str, ...]
    treatment: Literal["served", "free", "refused"] = "refused"
    harmless: tuple[Any, ...] = ()
    only_with: tuple[str, ...] = ()
    same_as: str | None = None
    instead: str | None = None


@dataclass(frozen=True, slots=True)
class Problems:
    """What is wrong with an object's fields: in words, the first field at fault, whether we know it."""

    message: str
    param: str
    is_known: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The parameters of one kind of object, by name.

    `is_closed`: objects of this kind are this server's own, so that a field nobody knows is wrong; otherwise
    it is ignored, unless it is written nearly like one that is known, or speaks of adapters.
    """

    parameters: Mapping[str, Parameter]
    is_closed: bool = False
    names: frozenset[str] = frozenset()
    """Those that a misspelt one may stand for."""

    def problems(self, given: Mapping[str, Any], fields: Collection[str]) -> Problems | None:
        """What is wrong with `given`, an object without nulls, for a model with `fields`; None: nothing."""
        others = [name for name in given if name not in fields]
        if len(others) > _MAX_UNKNOWN:
            message = (
                f"Expected at most {_MAX_UNKNOWN} fields that are not known, but there are {len(others)}."
            )
            return Problems(message, others[0], is_known=False)
        refused = [name for name in others if self.asks(name, given)]
        unknown = [name for name in others if name not in refused and self._is_unknown(name)]
        mistakes = [text for name in unknown if (text := self._mistake(name, fields)) is not None]
        if not refused and not mistakes:
            return None
        sentences = [f"Not supported by this server: {self._listed(refused)}."] if refused else []
        sentences += [text for _, text in mistakes[:_SHOWN]]
        first = refused[0] if refused else mistakes[0][0]
        return Problems(" ".join(sentences), first, is_known=bool(refused))

    def asks(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether the parameter `name` of `given` asks for something, which a model without it cannot do."""
        if given.get(name) is None:
            return False
        value, parameter = given[name], self.parameters.get(name)
        if parameter is None:
            return _names_adapter(name, value)
        if parameter.treatment == "free" or any(_is_same(value, each) for each in parameter.harmless):
            return False
        if parameter.same_as is not None:
            return not _is_same(value, given.get(parameter.same_as) or 1)
        return not parameter.only_with or any(self.asks(other, given) for other in parameter.only_with)

    def _is_unknown(self, name: str) -> bool:
        # One that speaks of adapters and asks for nothing is as good as absent.
        return name not in self.parameters and (self.is_closed or not speaks_of_adapters(name))

    def _mistake(self, name: str, fields: Collection[str]) -> tuple[str, str] | None:
        meant = _meant(name, frozenset(fields), self.names)
        if meant is not None:
            return name, f"{named(name)} is not a field of this call. Did you mean {named(meant)}?"
        return (name, f"{named(name)} is not a field of this call.") if self.is_closed else None

    def _listed(self, refused: list[str]) -> str:
        shown = ", ".join(f"{named(name)}{self._hint(name)}" for name in refused[:_SHOWN])
        return shown if len(refused) <= _SHOWN else f"{shown}, and {len(refused) - _SHOWN} more"

    def _hint(self, name: str) -> str:
        parameter = self.parameters.get(name)
        if parameter is None:
            return " (use 'model' or 'adapters')"
        if parameter.instead is not None:
            return f" (use {parameter.instead})"
        values = [json.dumps(value) for value in parameter.harmless if value not in ("", [], {})]
        shown = " or ".join(values)
        return f" (only {shown} is accepted)" if values and len(shown) <= _SHOWN_HARMLESS_CHARS else ""


ANYTHING = Vocabulary({})
"""Of an object whose further fields nobody minds."""


def vocabulary(kind: str, call: Call | None = None, *, is_closed: bool = False) -> Vocabulary:
    """The parameters of objects of `kind`, a section of parameters.toml, as `call` has them."""
    entries = _tables()[kind]
    parameters = {name: _parameter(entry, call) for name, entry in entries.items()}
    names = frozenset(name for name, parameter in parameters.items() if parameter.treatment != "free")
    return Vocabulary(parameters, is_closed, names)


@lru_cache(maxsize=1024)  # a client sends the same fields with each request
def _meant(name: str, fields: frozenset[str], others: frozenset[str]) -> str | None:
    meant = nearest(name, fields)
    return nearest(name, others) if meant is None and len(name) >= _LEAST_CHARS_OF_OTHERS else meant


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(files("server.openai").joinpath("parameters.toml").read_text("utf-8"))


def _parameter(entry: Mapping[str, Any], call: Call | None) -> Parameter:
    return Parameter(
        sources=tuple(entry["from"]),
        treatment=entry.get("is", "refused"),
        harmless=(*entry.get("harmless", ()), *(entry.get(call, ()) if call else ())),
        only_with=tuple(entry.get("only_with", ())),
        same_as=entry.get("same_as"),
        instead=entry.get("instead"),
    )


def _names_adapter(name: str, value: Any, depth: int = 0) -> bool:
    """Whether a field that nobody knows speaks of adapters and asks for something, or holds one that does."""
    if value is None or value is False or value in ("", [], {}):
        return False
    held = list(value.items())[:_MAX_UNKNOWN] if isinstance(value, dict) and depth < _MAX_DEPTH else []
    return speaks_of_adapters(name) or any(_names_adapter(*item, depth + 1) for item in held)


def _is_same(value: Any, harmless: Any) -> bool:
    """Equal, also in being a truth value or not: Python holds 1 equal to True."""
    return isinstance(value, bool) == isinstance(harmless, bool) and value == harmless

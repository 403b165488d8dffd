"""The vocabulary of the wire models: bounded types, and how a known but unsupported parameter is refused.

Models built on `Wire` take null for absent, treat fields that they do not have by a vocabulary, never turn
one JSON type into another (but 8.0 is a whole number), and refuse NaN and infinity. Knows no endpoint. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.openai.parameters import ANYTHING, Vocabulary, vocabulary
from server.validation import UNKNOWN, UNSUPPORTED

__all__ = [
    "NO_LIMIT",
    "AdapterName",
    "AdapterWeight",
    "Limit",
    "LogitBias",
    "OneOrMoreAdapters",
    "Penalty",
    "Stop",
    "TokenId",
    "Tokens",
    "Whole",
    "Wire",
    "problem",
    "unsupported",
]

# A stop string costs as many steps as it has characters, once; looking for it then costs nothing more.
_MAX_STOPS = 256
_MAX_STOP_CHARS = 256
_MAX_STOPS_CHARS = 16_384
_MAX_BIASES = 1024
_MAX_TOKEN_ID = 2**31 - 1
_MAX_LIMIT = 10_000_000
NO_LIMIT = -1
"""As `max_tokens`: as many as the context has room for."""


def unsupported(what: str, param: str | None = None) -> PydanticCustomError:
    """The refusal of `what`. `param` names the field within the model that raises it."""
    context = {"what": what} if param is None else {"what": what, "param": param}
    return PydanticCustomError(UNSUPPORTED, "Not supported by this server: {what}.", context)


def problem(param: str, message: str, **words: str) -> PydanticCustomError:
    """What is wrong with the field `param` of the model that raises it, beside others."""
    return PydanticCustomError("combination", message, {"param": param, **words})  # type: ignore[arg-type]


class Wire(BaseModel):
    """A JSON object that a client sends.

    `vocabulary` says what becomes of fields that the model does not have: those that ask for something which
    others support and this server does not are a 400 that names them, so that no wish is silently ignored.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    vocabulary: ClassVar[Vocabulary] = ANYTHING

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        present = {name: value for name, value in given.items() if value is not None}
        problems = cls.vocabulary.problems(present, cls.model_fields.keys())
        if problems is not None:
            kind = UNSUPPORTED if problems.is_known else UNKNOWN
            raise PydanticCustomError(kind, "{what}", {"what": problems.message, "param": problems.param})
        return present


def _stops(value: Any) -> Any:
    """As a list; empty strings ask for nothing."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [text for text in value if text != ""]
    raise PydanticCustomError("stop_type", "should be a string or a list of strings")


def _few_stop_chars(stops: list[str]) -> list[str]:
    chars = sum(map(len, stops))
    if chars > _MAX_STOPS_CHARS:
        message = "should have at most {limit} characters in all, but has {chars}"
        raise PydanticCustomError("stop_chars", message, {"limit": _MAX_STOPS_CHARS, "chars": chars})
    return stops


def _whole(value: Any) -> Any:
    """8.0 as 8: JSON has one kind of number, and some languages write whole ones so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wholes(value: Any) -> Any:
    return list(map(_whole, value)) if isinstance(value, list) and float in set(map(type, value)) else value


def _limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        message = "should be greater than or equal to 1, or {none} for as many as there is room for"
        raise PydanticCustomError("limit", message, {"none": NO_LIMIT})
    return value


def _few_biases(value: Any) -> Any:
    if value == []:  # llama.cpp's way to say none
        return {}
    # Before the entries are looked at: a million wrong ones would be a million problems to report.
    if isinstance(value, dict) and len(value) > _MAX_BIASES:
        raise PydanticCustomError("too_many", "should have at most {limit} entries", {"limit": _MAX_BIASES})
    return value


def _token_id(key: Any) -> Any:
    if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal():
        return int(key)
    raise PydanticCustomError("token_id", "should have token ids as its keys")


Whole = Annotated[int, BeforeValidator(_whole)]
Limit = Annotated[int, Field(le=_MAX_LIMIT), BeforeValidator(_whole), AfterValidator(_limit)]
"""How many tokens at most; -1 for as many as the context has room for."""
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(_wholes)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]],
    Field(max_length=_MAX_STOPS, fail_fast=True),
    BeforeValidator(_stops),
    AfterValidator(_few_stop_chars),
]
LogitBias = Annotated[
    dict[
        Annotated[TokenId, BeforeValidator(_token_id)],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    BeforeValidator(_few_biases),
]


class AdapterWeight(Wire):
    """One term of a blend: an adapter's id, and the factor that its delta gets."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("adapter", is_closed=True)

    id: Annotated[str, Field(min_length=1, max_length=300)]
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0


def _one_by_name(value: Any) -> Any:
    """mlx-lm's way to name one adapter, as a list."""
    if not isinstance(value, str):
        return value
    return [{"id": value}] if value else []


OneOrMoreAdapters = Annotated[
    list[AdapterWeight], Field(max_length=16, fail_fast=True), BeforeValidator(_one_by_name)
]
AdapterName = Annotated[
    Annotated[str, Field(max_length=300)] | None,
    BeforeValidator(lambda value: None if value in ("", []) else value),
]

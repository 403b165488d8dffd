"""The vocabulary of the wire models: bounded types, and how a known but unsupported parameter is refused.

Models built on `Wire` take null for absent, ignore what they do not know, never turn one JSON type into
another, and refuse NaN and infinity. Knows no endpoint. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.validation import UNSUPPORTED

__all__ = [
    "AdapterWeight",
    "Count",
    "Harmless",
    "LogitBias",
    "Penalty",
    "Stop",
    "TokenId",
    "Wire",
    "unsupported",
]

_MAX_STOPS = 16
_MAX_STOP_CHARS = 256
_MAX_BIASES = 1024
_MAX_TOKEN_ID = 2**31 - 1

Harmless = Mapping[str, tuple[Any, ...]]


def unsupported(what: str, param: str | None = None) -> PydanticCustomError:
    """The refusal of `what`. `param` names the field within the model that raises it."""
    context = {"what": what} if param is None else {"what": what, "param": param}
    return PydanticCustomError(UNSUPPORTED, "Not supported by this server: {what}.", context)


class Wire(BaseModel):
    """A JSON object that a client sends.

    `refused` names parameters that others support and this server does not, each with the values that ask for
    nothing: those are accepted, any other is a 400, so that no wish is silently ignored.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    refused: ClassVar[Harmless] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        present = {name: value for name, value in given.items() if value is not None}
        refused = [name for name, harmless in cls.refused.items() if _asks(present, name, harmless)]
        if refused:
            raise unsupported(", ".join(f"'{name}'" for name in refused), param=refused[0])
        return present


def _asks(present: Mapping[str, Any], name: str, harmless: tuple[Any, ...]) -> bool:
    return name in present and present[name] not in harmless


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("stop_type", "should be a string or a list of strings")


def _few_biases(value: Any) -> Any:
    # Before the entries are looked at: a million wrong ones would be a million problems to report.
    if isinstance(value, dict) and len(value) > _MAX_BIASES:
        raise PydanticCustomError("too_many", "should have at most {limit} entries", {"limit": _MAX_BIASES})
    return value


def _token_id(key: Any) -> Any:
    if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal():
        return int(key)
    raise PydanticCustomError("token_id", "should have token ids as its keys")


Count = Annotated[int, Field(ge=1, le=10_000_000)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]],
    Field(max_length=_MAX_STOPS, fail_fast=True),
    BeforeValidator(_as_list),
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

    id: Annotated[str, Field(min_length=1, max_length=128)]
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0

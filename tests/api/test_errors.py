"""The one table from errors to HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from adapters_core.errors import (
    BlendError,
    ContainerStateError,
    InvalidAdapterError,
    UnsupportedModelError,
)
from server.adapters.errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterMemoryBusyError,
    AdapterMemoryError,
    LifeCycleError,
    PathNotAllowedError,
    UnknownModelError,
)
from server.engine.errors import EngineOverloadedError, EngineStoppedError, InvalidSubmitError
from server.errors import ApiError, ConflictError, error_response, to_api_error


class _NewKindOfBlendError(BlendError):
    pass


TABLE: list[tuple[Exception, int, str, str | None]] = [
    (BlendError("no"), 400, "invalid_request_error", "not_blendable"),
    (_NewKindOfBlendError("no"), 400, "invalid_request_error", "not_blendable"),
    (ContainerStateError("no"), 409, "invalid_request_error", "adapter_state"),
    (InvalidAdapterError("x", ["a", "b"]), 422, "invalid_request_error", "adapter_invalid"),
    (UnsupportedModelError(["a"]), 422, "invalid_request_error", "model_unsupported"),
    (UnknownModelError("x", ["y"]), 404, "invalid_request_error", "model_not_found"),
    (AdapterExistsError("x"), 409, "invalid_request_error", "adapter_exists"),
    (PathNotAllowedError("no"), 403, "permission_error", "path_not_allowed"),
    (AdapterMemoryError(2, 1), 507, "server_error", "adapter_memory_exceeded"),
    (AdapterMemoryBusyError.in_vain(30.0), 503, "server_error", "adapter_memory_busy"),
    (EngineOverloadedError(2, 1), 503, "server_error", "server_overloaded"),
    (EngineStoppedError("no"), 503, "server_error", "engine_stopped"),
    (InvalidSubmitError("no"), 400, "invalid_request_error", None),
    (ConflictError("no"), 409, "invalid_request_error", None),
    (HTTPException(418), 418, "invalid_request_error", None),
    (HTTPException(502), 502, "server_error", None),
    (RuntimeError("secret"), 500, "server_error", "internal_error"),
    (KeyError("secret"), 500, "server_error", "internal_error"),
    (LookupError("/etc/secret"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), TABLE)
def test_the_table(error: Exception, status: int, kind: str, code: str | None) -> None:
    reply = error_response(error)
    assert reply.status_code == status
    body = json.loads(bytes(reply.body))["error"]
    assert (body["type"], body["code"]) == (kind, code)
    assert {"message", "param"} < body.keys()
    assert "secret" not in body["message"]


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (EngineOverloadedError(2, 1), "1"),
        (EngineOverloadedError(2, 1, retry_seconds=12.1), "13"),
        (EngineStoppedError("no"), "5"),
        (AdapterMemoryBusyError.in_vain(30.0), "1"),
    ],
)
def test_what_may_be_tried_again_says_when(error: Exception, seconds: str) -> None:
    assert error_response(error).headers["retry-after"] == seconds


def subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_of_the_life_cycle_has_a_status_and_a_code() -> None:
    for kind in subclasses(LifeCycleError) - {LifeCycleError}:
        assert 400 <= kind.status < 600
        assert kind.code


def test_problems_are_listed_in_the_details() -> None:
    body = to_api_error(InvalidAdapterError("x", ["a is missing", "b has NaN"])).body()
    assert body["error"]["details"] == ["a is missing", "b has NaN"]
    assert "details" not in to_api_error(BlendError("no")).body()["error"]


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (AdapterExistsError("x"), False),
        (AdapterMemoryError(2, 1), False),
        (InvalidAdapterError("x", ["a"]), False),
        (AdapterBusyError("busy", 1), True),
        (EngineOverloadedError(2, 1), True),
        (RuntimeError(), True),
    ],
)
def test_clients_are_told_when_a_retry_is_of_no_use(error: Exception, retried: bool) -> None:
    assert (error_response(error).headers.get("x-should-retry") != "false") is retried


def test_only_what_passes_is_to_be_retried_at_a_time() -> None:
    assert error_response(EngineOverloadedError(2, 1)).headers["retry-after"] == "1"


def test_long_messages_are_cut() -> None:
    assert len(ApiError(400, "x" * 100_000).body()["error"]["message"]) < 5000

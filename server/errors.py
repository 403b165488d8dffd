"""The one table from errors to HTTP, and the shape that every error body has.

ApiError
├── InvalidRequestError          400, something is wrong with what was sent
│   ├── UnsupportedParameterError  a known parameter that this server does not support (yet)
│   └── ContextLengthError         prompt, or prompt and completion, do not fit into the model's context
├── AuthenticationError          401, no key or a wrong one
├── ForbiddenError               403, a host, origin or path that is not allowed
├── NotFoundError                404
├── ConflictError                409, the state of the server does not allow it
├── BodyTimeoutError             408, the body did not come in time
├── BodyTooLargeError            413
├── MediaTypeError               415, a body that is compressed, or not in UTF-8
├── OverloadedError              503, with Retry-After
│   └── ServerStoppingError        the server stops before it has answered
├── GenerationFailedError        500, the engine gave a request up
└── InternalError                500, says nothing of the inside

Other packages raise errors that know no HTTP; `to_api_error` gives each its status. It knows no route.
Runs on the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters_core.errors import (
    BlendError,
    ContainerStateError,
    FolderChangedError,
    InvalidAdapterError,
    InvalidBlendError,
    OutsideRootError,
    UnsupportedModelError,
)
from server.adapters.errors import (
    AdapterBusyError,
    AdapterChangingError,
    AdapterMemoryBusyError,
    LifeCycleError,
    VersionUnreadableError,
)
from server.engine.errors import (
    EngineMemoryError,
    EngineOverloadedError,
    EngineStoppedError,
    EngineStuckError,
    InvalidSubmitError,
)
from server.engine.messages import FailureKind
from server.resources import is_exhaustion
from server.urls import allowed_methods, meant_url
from server.validation import describe_problems

__all__ = [
    "ApiError",
    "AuthenticationError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "ConflictError",
    "ContextLengthError",
    "ForbiddenError",
    "GenerationFailedError",
    "InternalError",
    "InvalidRequestError",
    "MediaTypeError",
    "NotFoundError",
    "OverloadedError",
    "ServerStoppingError",
    "UnsupportedParameterError",
    "error_response",
    "install",
    "to_api_error",
]

# What a supervisor and the loading of a model take, roughly: when another server may be there.
_RESTART_SECONDS = 5
_MAX_MESSAGE_CHARS = 4000

# Clients retry 408, 409, 429 and 5xx by themselves unless they are told that it is of no use.
_NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An error as a client sees it. `details` is put into the body only when given."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        details: Sequence[Any] | Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.details = details
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent, `{"error": {"message", "type", "param", "code"}}`."""
        error: dict[str, Any] = {
            "message": _bounded(self.message),
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.details is not None:
            error["details"] = self.details
        return {"error": error}


class InvalidRequestError(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


class UnsupportedParameterError(InvalidRequestError):
    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param=param, code="unsupported_parameter")


class ContextLengthError(InvalidRequestError):
    """`problem` says what came. Clients know this error by its code, by how the message begins, or by the
    words "prompt is too long".
    """

    def __init__(self, context_tokens: int, problem: str, param: str) -> None:
        message = f"This model's maximum context length is {context_tokens} tokens, but {problem}."
        super().__init__(message, param=param, code="context_length_exceeded")


class AuthenticationError(ApiError):
    def __init__(self, message: str) -> None:
        headers = {"WWW-Authenticate": "Bearer"}
        super().__init__(401, message, type="authentication_error", code="invalid_api_key", headers=headers)


class ForbiddenError(ApiError):
    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(403, message, type="permission_error", param=param, code=code)


class NotFoundError(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(404, message, param=param, code=code)


class ConflictError(ApiError):
    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(409, message, param=param, code=code, headers={} if retry else _NO_RETRY)


class BodyTooLargeError(ApiError):
    def __init__(self, limit_bytes: int | None = None) -> None:
        limit = "" if limit_bytes is None else f" It may have at most {limit_bytes} bytes."
        super().__init__(413, f"The request's body is too large.{limit}", code="body_too_large")


class BodyTimeoutError(ApiError):
    def __init__(self, limit_seconds: float) -> None:
        message = f"The request's body did not come within {limit_seconds:g} s."
        super().__init__(408, message, code="body_timeout")


class MediaTypeError(ApiError):
    """A body that says to be of a kind that is not read here."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(415, message, code=code, headers={"Accept-Encoding": "identity"})


class OverloadedError(ApiError):
    """`retry_seconds` is when there may be room again, as far as that is known."""

    def __init__(self, message: str, code: str = "server_overloaded", retry_seconds: float = 1) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(retry_seconds)))}
        super().__init__(503, message, type="server_error", code=code, headers=headers)


class ServerStoppingError(OverloadedError):
    def __init__(self) -> None:
        message = "The server is stopping; this request was not finished."
        super().__init__(message, code="server_stopping", retry_seconds=_RESTART_SECONDS)


class GenerationFailedError(ApiError):
    """`message` is the engine's, which names nothing of the inside. Logits that are not finite come again."""

    def __init__(self, message: str, kind: FailureKind = "engine") -> None:
        message = f"The request was not finished: {message}."
        code, headers = (
            ("logits_not_finite", _NO_RETRY) if kind == "not_finite" else ("generation_failed", {})
        )
        super().__init__(500, message, type="server_error", code=code, headers=headers)


class InternalError(ApiError):
    def __init__(self) -> None:
        message = "The server met an unexpected error. Its log has it under this reply's x-request-id."
        super().__init__(500, message, type="server_error", code="internal_error")


def _from_invalid_adapter(error: InvalidAdapterError) -> ApiError:
    if is_exhaustion(error):
        return _from_unforeseen(error)
    return ApiError(422, str(error), code="adapter_invalid", details=error.details, headers=_NO_RETRY)


def _from_invalid_blend(error: InvalidBlendError) -> ApiError:
    message = f"The adapters cannot be blended so: {error}."
    param = _option_at_fault(error)
    return ApiError(400, message, param=param, code="not_blendable", details=list(error.problems))


def _option_at_fault(error: InvalidBlendError) -> str:
    """The field of the body that the first problem names; modules are the blended adapters' affair."""
    name = error.problems[0].partition(":")[0]
    return name if name in ("method", "density", "rank", "seed") else "blend"


def _from_unsupported_model(error: UnsupportedModelError) -> ApiError:
    return ApiError(422, str(error), code="model_unsupported", details=list(error.reasons), headers=_NO_RETRY)


def _from_life_cycle(error: LifeCycleError) -> ApiError:
    kinds = {403: "permission_error", 507: "server_error"}
    return ApiError(
        error.status,
        str(error),
        type=kinds.get(error.status, "invalid_request_error"),
        param=error.param,
        code=error.code,
        details=error.details,
        # Only waiting can mend a busy adapter; the others come back the same.
        headers={} if isinstance(error, AdapterBusyError) else _NO_RETRY,
    )


def _from_http(error: HTTPException) -> ApiError:
    # FastAPI wraps whatever reading a body raised into a bare 400.
    if isinstance(error.__cause__, ApiError):
        return error.__cause__
    if error.status_code == 413:
        return BodyTooLargeError()
    if error.status_code == 400 and isinstance(error.__cause__, (RecursionError, ValueError)):
        return InvalidRequestError("The body cannot be read as JSON: wrong encoding, or nested too deeply.")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return ApiError(error.status_code, str(error.detail), type=kind, headers=error.headers)


def _from_validation(error: RequestValidationError) -> ApiError:
    message, param, code = describe_problems(error.errors(), error.body)
    return InvalidRequestError(message, param=param, code=code)


def _from_unforeseen(error: Exception) -> ApiError:
    if is_exhaustion(error):
        return OverloadedError(
            "The system gives the server no more threads, files or memory for this; GET /ready says more.",
            code="out_of_resources",
        )
    return InternalError()


def _from_engine_memory(error: EngineMemoryError) -> ApiError:
    mend = "Ask for fewer max_tokens or choices, shorten the prompt, or raise the server's kv_memory_bytes."
    message = f"The request is too large for the server's memory: {error}. {mend}"
    return ApiError(503, message, type="server_error", code="kv_memory_exceeded", headers=_NO_RETRY)


# The nearest class in an error's ancestry decides.
_TABLE: Mapping[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: lambda error: error,
    BlendError: lambda error: InvalidRequestError(str(error), param="adapters", code="not_blendable"),
    ContainerStateError: lambda error: ConflictError(str(error), code="adapter_state"),
    FolderChangedError: lambda error: ConflictError(f"{error}.", code="folder_changed", retry=True),
    InvalidAdapterError: _from_invalid_adapter,
    InvalidBlendError: _from_invalid_blend,
    OutsideRootError: lambda error: ForbiddenError(f"{error}.", code="path_not_allowed", param="path"),
    UnsupportedModelError: _from_unsupported_model,
    EngineMemoryError: _from_engine_memory,
    EngineOverloadedError: lambda error: OverloadedError(
        f"The server is busy: {error}.", retry_seconds=error.retry_seconds
    ),
    EngineStoppedError: lambda error: OverloadedError(
        "The model is not served.", code="engine_stopped", retry_seconds=_RESTART_SECONDS
    ),
    EngineStuckError: lambda error: OverloadedError(
        f"The model does not answer: {error}.", code="engine_stuck", retry_seconds=_RESTART_SECONDS
    ),
    AdapterChangingError: lambda error: OverloadedError(str(error), code=error.code),
    AdapterMemoryBusyError: lambda error: OverloadedError(str(error), code=error.code),
    VersionUnreadableError: lambda error: OverloadedError(str(error), code=error.code),
    LifeCycleError: _from_life_cycle,
    InvalidSubmitError: lambda error: InvalidRequestError(str(error)),
    HTTPException: _from_http,
    RequestValidationError: _from_validation,
    Exception: _from_unforeseen,
}


def to_api_error(error: Exception) -> ApiError:
    """What a client is told about `error`. Whoever calls it logs an error that turns out internal."""
    translate = next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    return translate(error)


def error_response(error: Exception) -> JSONResponse:
    """The reply to a request that ended in `error`."""
    known = to_api_error(error)
    return JSONResponse(known.body(), status_code=known.status, headers=known.headers)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        error = _with_place(request, error)
    return error_response(error)


def _with_place(request: Request, error: HTTPException) -> Exception:
    """Starlette's two own errors, of routing, with what was asked for and what there is."""
    routes, path = request.app.routes, request.url.path
    if error.status_code == 404 and error.detail == "Not Found":
        meant = meant_url(routes, request.method, path)
        hint = f"Did you mean {_bounded(meant, 200)}?" if meant else "/openapi.json describes what there is."
        message = f"There is no {_bounded(request.method, 20)} {_bounded(path, 200)!r} here. {hint}"
        return NotFoundError(message, code="unknown_url")
    if error.status_code == 405:
        allowed = ", ".join(allowed_methods(routes, path))
        message = f"{_bounded(request.method, 20)} is not allowed here; allowed: {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    return error


def install(app: FastAPI) -> None:
    """Answer every error of the table in the contract's shape.

    The table's last row, what nobody expected, is not installed here: `UnexpectedErrorMiddleware` logs
    and answers it.
    """
    for kind in _TABLE:
        if kind is not Exception:
            app.add_exception_handler(kind, _handle)


def _bounded(text: str, limit_chars: int = _MAX_MESSAGE_CHARS) -> str:
    return text if len(text) <= limit_chars else f"{text[:limit_chars]}…"

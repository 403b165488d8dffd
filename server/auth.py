"""The API key: a dependency that every router but the open health routes carries.

Guards are dependencies of routes, never prefixes of URLs, so that a new route cannot slip past one by
its path. A dependency runs once the body has been read, so that routes with a body call `check_key` before
(`JsonRoute`). Runs on the event loop.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from server.errors import AuthenticationError

__all__ = ["check_key", "require_api_key"]

_BEARER = HTTPBearer(auto_error=False, description="The server's API key, if it was started with one.")
_HEADER = APIKeyHeader(name="x-api-key", auto_error=False, description="The same key in a header of its own.")


async def require_api_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
    header: Annotated[str | None, Security(_HEADER)] = None,
) -> None:
    """`check_key` as a dependency, which describes the key in the API's document.

    Raises:
        AuthenticationError: no key came, or another one.
    """
    check_key(request)


def check_key(request: Request) -> None:
    """Let the request pass if the server has no key, or if the request's headers bring it.

    Raises:
        AuthenticationError: no key came, or another one.
    """
    expected = request.app.state.settings.api_key
    if expected is None:
        return
    given = _given_key(request)
    if given is None:
        raise AuthenticationError(
            "An API key is required: send it as 'Authorization: Bearer KEY' or in the header 'x-api-key'."
        )
    if not hmac.compare_digest(given.encode(), expected.get_secret_value().encode()):
        raise AuthenticationError("The API key is not this server's.")


def _given_key(request: Request) -> str | None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return request.headers.get("x-api-key") or None

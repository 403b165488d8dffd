"""Talks to a running server for the commands that are its clients; every failure is one sentence.

Knows the server's HTTP contract and nothing of its inside. Blocking; main thread.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx
import typer

__all__ = ["ApiKey", "ApiKeyFile", "Client", "ClientError", "Url", "adapter_path"]

# Fusing a large model or waiting for requests to finish takes minutes; connecting does not.
_TIMEOUT = httpx.Timeout(600, connect=10)

Url = Annotated[str, typer.Option("--url", envvar="GRAFT_URL", help="Address of the server.", metavar="URL")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="GRAFT_API_KEY",
        help="The server's API key. Other users see flags in the process list: prefer a file.",
        metavar="TEXT",
        show_envvar=True,
    ),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File that holds the server's API key.", metavar="FILE")
]


class ClientError(Exception):
    """What was asked for was not done; the message is a sentence.

    `body` is the server's JSON answer, `code` the short word for programs in it.
    """

    def __init__(self, message: str, body: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.body = body
        self.code = code


def adapter_path(adapter_id: str, *rest: str) -> str:
    """The URL path of an adapter, or of something of it."""
    return "/".join(["/v1/adapters", quote(adapter_id, safe=""), *rest])


class Client:
    """A server at `url`. Raises ClientError from every method; use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None, api_key_file: Path | None = None) -> None:
        self.url = _normalised(url)
        key = _key(api_key, api_key_file)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
            # A proxy for the internet cannot reach this machine's own server.
            trust_env=not _is_local(self.url),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str | float] | None = None,
    ) -> str:
        """The server's answer to a request, the text of a JSON object."""
        with self._sentences():
            response = self._http.request(method, path, json=body, params=params)
            self._check(response)
            return response.text

    def stream_chat(self, body: Mapping[str, Any]) -> Generator[str]:
        """The pieces of the first choice's text, as they come. Closing the iterator cancels the request."""
        with closing(self.stream("/v1/chat/completions", body)) as events:
            for event in events:
                yield _delta(event)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The events of an answer, as they come. Closing the iterator closes the connection."""
        with (
            self._sentences(),
            self._http.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            if response.is_error:
                response.read()
            self._check(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = self._parse(data)
                if "error" in event:
                    message = _message(event) or "the server ended the answer with an error."
                    raise ClientError(message, data, _code(event))
                yield event
            raise ClientError(f"{self.url} closed the connection before the answer was complete.")

    def parse(self, text: str) -> dict[str, Any]:
        """A JSON object that `call` returned."""
        return self._parse(text)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ClientError(
                f"no server answers at {self.url} ({error}). Start one with `mlx-graft serve MODEL` or "
                f"`mlx-graft demo`, or name another address with --url."
            ) from error
        except httpx.TimeoutException as error:
            raise ClientError(f"{self.url} did not answer in time ({type(error).__name__}).") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ClientError(f"the request to {self.url} failed: {error}.") from error

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            body = response.json()
        except ValueError:
            raise ClientError(self._foreign(response.status_code)) from None
        raise ClientError(_message(body) or self._foreign(response.status_code), response.text, _code(body))

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ClientError(
                f"expected JSON from {self.url}, but got {text[:80]!r}: is it an mlx-graft server?"
            )
        return value

    def _foreign(self, status: int) -> str:
        return f"{self.url} answered {status} without an explanation: is it an mlx-graft server?"


def _message(body: object) -> str | None:
    """The sentence in an error body of the contract's shape, with the details that it lacks."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    message: str = error["message"]
    details = error.get("details")
    more = [item for item in details if isinstance(item, str)] if isinstance(details, list) else []
    missing = [item for item in more if item not in message]
    return " ".join([message, *missing])


def _code(body: object) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


def _delta(event: Mapping[str, Any]) -> str:
    """The text of a chunk's first choice; chunks of usage have no choice."""
    for choice in event.get("choices") or ():
        if isinstance(choice, dict) and choice.get("index", 0) == 0:
            return str((choice.get("delta") or {}).get("content") or "")
    return ""


def _normalised(url: str) -> str:
    url = url.strip().rstrip("/").removesuffix("/v1")
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises ValueError when it is not a port
    except ValueError:
        valid = False
    if not valid:
        raise ClientError(f"expected --url to be like http://127.0.0.1:8000, but got {url!r}.")
    return url


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(api_key: str | None, api_key_file: Path | None) -> str | None:
    if api_key_file is None:
        key = api_key
    else:
        try:
            key = api_key_file.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ClientError(
                f"expected --api-key-file to name a file with the key, but: {error}."
            ) from error
    if key and not (key.isascii() and key.isprintable()):
        raise ClientError("expected an API key of printable ASCII characters.")
    return key

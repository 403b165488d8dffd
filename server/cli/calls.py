"""One call of a server, for the commands that make one: its answer as JSON or as sentences. Main thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.client import Client, ClientError
from server.cli.output import fail

__all__ = ["DEFAULT_URL", "Id", "Json", "run_call"]

DEFAULT_URL = "http://127.0.0.1:8000"

Id = Annotated[str, typer.Argument(metavar="ID", help="Name of the adapter.", show_default=False)]
# Errors tell what to send; on a command line, the same is said so.
_HINTS = {
    "adapter_exists": "Here that is --replace.",
    "adapters_loaded": "Here these are `mlx-graft adapters unload ID` and --unload-others.",
    "base_is_fused": "Here that is `mlx-graft adapters unfuse ID`.",
}

Json = Annotated[bool, typer.Option("--json", help="Print the server's JSON as it is, and nothing else.")]


def run_call(
    url: str,
    api_key: str | None,
    api_key_file: Path | None,
    json: bool,
    tell: Callable[[Mapping[str, Any]], None],
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    params: Mapping[str, float] | None = None,
    call: Callable[[Client, str, Mapping[str, Any]], str] | None = None,
) -> None:
    """One call, made by `call` if given; its answer as JSON or as `tell` puts it.

    An error is a sentence and exit code 1.
    """
    try:
        with Client(url, api_key, api_key_file) as client:
            text = call(client, path, body or {}) if call else client.call(method, path, body, params)
            answer = client.parse(text)
    except ClientError as error:
        if json and error.body is not None:
            typer.echo(error.body)
        fail(" ".join([str(error), *([_HINTS[error.code]] if error.code in _HINTS else [])]))
    if json:
        typer.echo(text)
    else:
        tell(answer)

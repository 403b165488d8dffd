"""`mlx-graft adapters save …`: what a server has loaded, as an adapter folder. A client; main thread."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from server.cli.calls import DEFAULT_URL, Id, Json, run_call
from server.cli.client import ApiKey, ApiKeyFile, Url, adapter_path
from server.cli.output import human_bytes, say

__all__ = ["save"]


class _Format(StrEnum):
    MLX = "mlx"
    PEFT = "peft"


def save(
    id: Id,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Folder to make under the server's adapters root.", show_default=False
        ),
    ],
    format: Annotated[_Format, typer.Option("--format", help="Whose files are written.")] = _Format.MLX,
    version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, help="A version that lives; the current one if unset.", metavar="NUMBER"
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Save a loaded adapter, such as a blend, as a folder that any server, mlx-lm or PEFT can load."""
    body: dict[str, Any] = {"save_to": name}
    body |= {} if format is _Format.MLX else {"format": format.value}
    body |= {} if version is None else {"version": version}

    def tell(saved: Mapping[str, Any]) -> None:
        say(
            f"Saved {saved.get('id')}, version {saved.get('version')}, as the folder {saved.get('path')} in "
            f"the format {saved.get('format')}: {saved.get('modules')} modules, "
            f"{human_bytes(saved.get('bytes'))}."
        )
        for note in saved.get("notes") or ():
            say(str(note))

    run_call(url, api_key, api_key_file, json, tell, "POST", adapter_path(id, "save"), body)

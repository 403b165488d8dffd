"""`mlx-graft clean`: removes what processes that were killed left behind. Needs no server. Main thread."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from server.cache_dir import default_cache_dir
from server.cli.output import fail, say

__all__ = ["clean"]


def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders to clean: the adapters root, the models root, wherever convert has written.",
            show_default=False,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="The server's cache folder, if it is another than by default."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Remove what killed processes left half-written, in these folders and in the cache folder.

    A server does the same when it starts. What a living process writes stays, and so does all else.
    """
    from server.leftovers import sweep_cache, sweep_folders

    for folder in folders or ():
        if not folder.is_dir():
            fail(f"there is no folder {str(folder)!r}.", code=2)
    swept = sweep_folders(folders or ()) + sweep_cache(cache_dir or default_cache_dir())
    if json:
        typer.echo(json_format.dumps({"removed": [str(path) for path in swept]}))
        return
    for path in swept:
        say(f"Removed {path}.")
    say("Nothing is left half-written." if not swept else f"{len(swept)} removed.")

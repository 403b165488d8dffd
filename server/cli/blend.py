"""`mlx-graft adapters blend …`: make an adapter of others, on a running server. A client; main thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from server.cli.calls import DEFAULT_URL, Id, Json, run_call
from server.cli.client import ApiKey, ApiKeyFile, Url
from server.cli.fusing import weighted
from server.cli.output import adapter_sentence, say

__all__ = ["blend"]


def blend(
    id: Id,
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART[=WEIGHT]...", help="Adapters, each with its weight (1).", show_default=False
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="linear (the default), svd, ties, dare_linear or dare_ties.", metavar="TEXT"
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density", help="Share of entries that ties and dare keep, above 0 to 1.", metavar="NUMBER"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Rank of the result; the largest of the parts if unset.", metavar="NUMBER"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="What dare draws from (0).", metavar="NUMBER")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it loaded when memory is needed.")] = False,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the active adapter.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Make a new version if it is loaded.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Make an adapter of others, each with a weight."""
    given = {"method": method, "density": density, "rank": rank, "seed": seed}
    wishes = {"pinned": pin or None, "activate": activate or None, "replace": replace or None}
    body: dict[str, Any] = {"id": id, "blend": [weighted(text) for text in parts]}
    body |= {name: value for name, value in {**given, **wishes}.items() if value is not None}

    def tell(adapter: Mapping[str, Any]) -> None:
        recipe = adapter.get("blend") or {}
        say(f"Blended {id} by {recipe.get('method')}: {adapter_sentence(adapter)}.")
        if worst := recipe.get("error_worst"):
            mean = recipe.get("error_mean") or 0.0
            say(f"Left out by its rank: {mean:.1%} of the merged changes on average, {worst:.1%} at worst.")

    run_call(url, api_key, api_key_file, json, tell, "POST", "/v1/adapters", body)

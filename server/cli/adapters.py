"""`mlx-graft adapters …`: look after the adapters of a running server. A client; main thread.

`inspect` alone needs no server.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from server.cli.blend import blend
from server.cli.calls import DEFAULT_URL, Id, Json, run_call
from server.cli.client import ApiKey, ApiKeyFile, Url, adapter_path
from server.cli.fusing import call_with_bar, weighted
from server.cli.inspect import inspect
from server.cli.models import Scale
from server.cli.output import (
    adapter_sentence,
    adapters_table,
    fail,
    human_bytes,
    report_table,
    say,
    show,
    warn,
)
from server.cli.save import save
from server.cli.show import show_adapter

__all__ = ["adapters_app"]


def adapters_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Look after the adapters of a running server; inspect folders.")
    app.command("list")(list_adapters)
    app.command("show")(show_adapter)
    app.command("load")(load)
    app.command("blend")(blend)
    app.command("unload")(unload)
    app.command("rollback")(rollback)
    app.command("swap")(swap)
    app.command("save")(save)
    app.command("fuse")(fuse)
    app.command("unfuse")(unfuse)
    app.command("inspect")(inspect)
    return app


def list_adapters(
    url: Url = DEFAULT_URL, api_key: ApiKey = None, api_key_file: ApiKeyFile = None, json: Json = False
) -> None:
    """Show the adapters that are loaded, and those that could be."""

    def tell(listing: Mapping[str, Any]) -> None:
        loaded, available = listing.get("data") or [], listing.get("available") or []
        if loaded:
            show(adapters_table(loaded))
        else:
            say("No adapter is loaded.")
        resident = human_bytes(listing.get("resident_bytes"))
        limit = human_bytes(listing.get("memory_limit_bytes"))
        resident = f"{resident} of {limit}" if resident and limit else resident
        say(f"Active: {listing.get('active') or 'none'}." + (f" Resident: {resident}." if resident else ""))
        if available:
            say(f"Not loaded: {', '.join(map(str, available))}.")
        for name, steps in (listing.get("checkpoints") or {}).items():
            say(f"Checkpoints of {name}, as {name}@step-…: {', '.join(map(str, steps))}.")

    run_call(url, api_key, api_key_file, json, tell, "GET", "/v1/adapters")


def load(
    id: Id,
    path: Annotated[
        str | None,
        typer.Option(
            "--path", help="Folder under the adapters root; the ID when left out.", metavar="FOLDER"
        ),
    ] = None,
    scale: Scale = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it loaded when memory is needed.")] = False,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the active adapter.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Load a new version if it is loaded.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Load an adapter from the server's adapters root."""
    body: dict[str, Any] = {"id": id}
    if path is not None:
        body["path"] = path
    if scale is not None:
        body["scale"] = scale
    body |= {name: True for name, on in (("pinned", pin), ("activate", activate), ("replace", replace)) if on}

    def tell(adapter: Mapping[str, Any]) -> None:
        say(f"Loaded {id}: {adapter_sentence(adapter)}.")
        for warning in (adapter.get("report") or {}).get("warnings") or []:
            warn(f"warning: {warning}")

    run_call(url, api_key, api_key_file, json, tell, "POST", "/v1/adapters", body)


def unload(
    id: Id,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0, help="Seconds to wait for requests that use it.", metavar="SECONDS"),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Unload an adapter once the requests that use it have finished."""

    def tell(adapter: Mapping[str, Any]) -> None:
        # Of what left memory nothing is free as long as others have the same layout: it is their room now.
        freed = human_bytes(adapter.get("freed_bytes") or None)
        say(f"Unloaded {id}." + (f" Freed {freed}." if freed else ""))

    params = {} if timeout is None else {"timeout_seconds": timeout}
    run_call(url, api_key, api_key_file, json, tell, "DELETE", adapter_path(id), params=params)


def rollback(
    id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Make an adapter's previous version the current one again."""

    def tell(adapter: Mapping[str, Any]) -> None:
        say(f"Rolled {id} back: {adapter_sentence(adapter)}.")

    run_call(url, api_key, api_key_file, json, tell, "POST", f"{adapter_path(id)}/rollback")


def swap(
    id: Annotated[
        str | None, typer.Argument(metavar="ID", help="Adapter to make active.", show_default=False)
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Make no adapter active: the base answers.")] = False,
    unload_previous: Annotated[
        bool, typer.Option("--unload-previous", help="Unload the one that was active.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Choose the adapter that answers requests which name none."""
    if none == (id is not None):
        fail("expected either the ID of an adapter or --none.", code=2)
    body = {"id": id, **({"unload_previous": True} if unload_previous else {})}

    def tell(swapped: Mapping[str, Any]) -> None:
        seconds = swapped.get("swap_seconds")
        took = f", in {seconds * 1000:.3g} ms" if isinstance(seconds, int | float) else ""
        now, before = swapped.get("active") or "none", swapped.get("previous") or "none"
        say(f"Active: {now} (before: {before}){took}.")

    run_call(url, api_key, api_key_file, json, tell, "PUT", "/v1/adapters/active", body)


def fuse(
    id: Id,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="auto (the default), requantize, keep or dequantize.", metavar="TEXT"
        ),
    ] = None,
    weight: Annotated[
        float | None, typer.Option("--weight", help="What its change is multiplied with.", metavar="NUMBER")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another adapter of a sum; repeatable.", metavar="ID[=WEIGHT]"),
    ] = None,
    unload_others: Annotated[
        bool, typer.Option("--unload-others", help="Unload the other adapters first.")
    ] = False,
    save_to: Annotated[
        str | None,
        typer.Option(
            "--save-to",
            help="Write a complete model under the server's models root, and leave the resident one alone.",
            metavar="NAME",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Fuse an adapter into the resident base model, or into a copy of it on disk."""
    given = {
        "precision": precision,
        "weight": weight,
        "adapters": [weighted(text) for text in with_ or ()] or None,
        "unload_others": unload_others or None,
        "save_to": save_to,
    }
    body = {name: value for name, value in given.items() if value is not None}

    def tell(report: Mapping[str, Any]) -> None:
        say(f"Fused {id} into {f'the folder {save_to}' if save_to else 'the resident base'}.")
        show(report_table(report))

    call = None if json or not sys.stderr.isatty() else call_with_bar
    run_call(url, api_key, api_key_file, json, tell, "POST", adapter_path(id, "fuse"), body, call=call)


def unfuse(
    id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Make the base what it was before an adapter was fused into it."""

    def tell(_report: Mapping[str, Any]) -> None:
        say(f"Unfused {id}: the base is what it was.")

    run_call(url, api_key, api_key_file, json, tell, "DELETE", adapter_path(id, "fuse"))

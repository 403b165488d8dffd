"""`mlx-graft adapters show …`: all that a server says of one adapter. A client; main thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.cli.calls import DEFAULT_URL, Id, Json, run_call
from server.cli.client import ApiKey, ApiKeyFile, Url, adapter_path
from server.cli.output import human_bytes, moment, origin, report_rows, report_table, show, state, warn

__all__ = ["show_adapter"]


def show_adapter(
    id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Show one adapter: its state, versions, checkpoints, and the report on what was loaded."""

    def tell(adapter: Mapping[str, Any]) -> None:
        report = adapter.get("report") or adapter
        show(report_table(_state_rows(adapter) | report_rows(report) | _use_rows(adapter)))
        for warning in report.get("warnings") or ():
            warn(f"warning: {warning}")

    run_call(url, api_key, api_key_file, json, tell, "GET", adapter_path(id))


def _state_rows(adapter: Mapping[str, Any]) -> dict[str, Any]:
    versions = [f"{each.get('version')} {each.get('state')}" for each in adapter.get("versions") or ()]
    return {
        "id": adapter.get("id"),
        "state": state(adapter),
        "from": origin(adapter),
        "versions": versions or adapter.get("version"),
        "checkpoints": adapter.get("checkpoints") or None,
    }


def _use_rows(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "memory": human_bytes(adapter.get("bytes")),
        "in flight": adapter.get("in_flight"),
        "requests": adapter.get("requests"),
        "loaded": moment(adapter.get("created")),
        "last used": moment(adapter.get("last_used")) or "never",
    }

"""What clients see of adapters and models: plain dictionaries for JSON. Knows no HTTP. Pure functions."""

from __future__ import annotations

from typing import Any

from server.engine.model import ModelInfo

from .registry import Registry
from .reports import report_on
from .source import Made
from .versions import Entry, Version

__all__ = [
    "adapter_in_full",
    "adapter_object",
    "available_model_object",
    "base_model_object",
    "model_object",
]


def adapter_object(entry: Entry, registry: Registry, shown: Version | None = None) -> dict[str, Any]:
    """An adapter as the management calls show it; times are whole seconds since 1970.

    A version that is `shown` is named with its number; state and use are those of the whole adapter.
    """
    version = entry.current if shown is None else shown
    resident, is_current = version.resident, version is entry.current
    scale = None if isinstance(version.source, Made) else version.source.scale
    given = {} if scale is None else {"scale_given": scale}
    return {
        "id": _name(entry, shown),
        "object": "adapter",
        "created": int(version.created),
        "base": registry.base,
        "path": version.source.shown,
        "blend": dict(version.source.recipe) if isinstance(version.source, Made) else None,
        "format": resident.format,
        "type": resident.type,
        "rank": resident.rank,
        "scale": resident.scale,
        **given,
        "modules": resident.modules,
        "bytes": resident.size_bytes,
        "digest": resident.digest,
        "version": version.number,
        "versions": _versions(entry),
        "checkpoints": list(entry.checkpoints),
        "state": entry.state,
        "resident": version.in_memory or (is_current and entry.state == "fused"),
        "pinned": version.pinned,
        "active": is_current and registry.active == entry.id,
        "in_flight": entry.in_flight,
        "requests": entry.requests,
        "last_used": None if entry.last_used is None else int(entry.last_used),
        "load_seconds": round(version.load_seconds, 6),
    }


def adapter_in_full(
    entry: Entry, registry: Registry, info: ModelInfo, shown: Version | None = None
) -> dict[str, Any]:
    """As `adapter_object`, with the report on what was loaded."""
    report = report_on(entry.current if shown is None else shown, registry, info)
    return adapter_object(entry, registry, shown) | {"report": None if report is None else report.to_values()}


def _name(entry: Entry, version: Version | None) -> str:
    return entry.id if version is None else f"{entry.id}@{version.number}"


def _versions(entry: Entry) -> list[dict[str, Any]]:
    """Those that live, the oldest first."""
    states = dict.fromkeys(entry.retired, "finishing")
    states |= dict.fromkeys(entry.named, "previous") | {entry.current: "current"}
    return [
        {
            "version": version.number,
            "digest": version.resident.digest,
            "created": int(version.created),
            "state": state,
        }
        for version, state in sorted(states.items(), key=lambda item: item[0].number)
        if version.number
    ]


def base_model_object(registry: Registry, root: str, created: float, context_tokens: int) -> dict[str, Any]:
    """The base as a model; `root` is what the operator named it by, without the place where it lies."""
    return _model(registry.base, created, root, None, context_tokens) | {"fused": registry.fused}


def model_object(
    entry: Entry, registry: Registry, context_tokens: int, version: Version | None = None
) -> dict[str, Any]:
    """An adapter as a model that descends from the base; a `version` is named with its number."""
    shown = entry.current if version is None else version
    model = _model(_name(entry, version), shown.created, shown.source.shown, registry.base, context_tokens)
    return model | {"state": entry.state}


def available_model_object(
    adapter_id: str, registry: Registry, created: float, context_tokens: int
) -> dict[str, Any]:
    """An adapter that the first request for it loads."""
    return _model(adapter_id, created, adapter_id, registry.base, context_tokens) | {"state": "available"}


def _model(
    name: str, created: float, root: str | None, parent: str | None, context_tokens: int
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "mlx-graft",
        "root": root,
        "parent": parent,
        "max_model_len": context_tokens,
    }

"""What clients see of adapters and models: plain dictionaries for JSON. Knows no HTTP. Pure functions."""

from __future__ import annotations

from typing import Any

from .registry import Entry, Registry

__all__ = ["adapter_object", "base_model_object", "model_object"]


def adapter_object(entry: Entry, registry: Registry) -> dict[str, Any]:
    """An adapter as the management calls show it; times are whole seconds since 1970."""
    version = entry.current
    resident = version.resident
    return {
        "id": entry.id,
        "object": "adapter",
        "created": int(version.created),
        "base": registry.base,
        "path": version.folder.shown,
        "format": "mlx",
        "type": resident.type,
        "rank": resident.rank,
        "scale": resident.scale,
        "modules": resident.modules,
        "bytes": resident.size_bytes,
        "digest": resident.digest,
        "version": version.number,
        "state": entry.state,
        "resident": version.in_memory or entry.state == "fused",
        "pinned": entry.pinned,
        "active": registry.active == entry.id,
        "in_flight": entry.in_flight,
        "requests": entry.requests,
        "last_used": None if entry.last_used is None else int(entry.last_used),
        "load_seconds": round(version.load_seconds, 6),
    }


def base_model_object(registry: Registry, root: str, created: float, context_tokens: int) -> dict[str, Any]:
    """The base as a model; `root` is what the operator named it by."""
    return _model(registry.base, created, root, None, fused=registry.fused) | {
        "max_model_len": context_tokens
    }


def model_object(entry: Entry, registry: Registry) -> dict[str, Any]:
    """An adapter as a model that descends from the base."""
    version = entry.current
    return _model(entry.id, version.created, version.folder.shown, registry.base, state=entry.state)


def _model(name: str, created: float, root: str, parent: str | None, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "mlx-graft",
        "root": root,
        "parent": parent,
        **more,
    }

"""`GET /v1/models`: the base, then each adapter as a model that descends from it. Runs on the event loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from server.adapters.names import parse_name
from server.adapters.service import AdapterService
from server.adapters.views import available_model_object, base_model_object, model_object
from server.routes.dependencies import Adapters, settings
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["OpenAI"])

Configured = Annotated[Settings, Depends(settings)]


@router.get("")
async def list_models(service: Adapters, configured: Configured) -> dict[str, Any]:
    """The names that requests may use in `model`, those included whose adapter the first request loads."""
    on_demand = await service.on_demand()
    registry, context_tokens = service.registry, service.info.context_tokens
    registered = [model_object(registry.get(name), registry, context_tokens) for name in registry.served[1:]]
    available = [
        available_model_object(name, registry, service.created, context_tokens)
        for name in on_demand
        if registry.find(name) is None  # what was loaded while the folders were read is above
    ]
    return {"object": "list", "data": [_base(service, configured), *registered, *available]}


@router.get("/{name:path}")
async def get_model(name: str, service: Adapters, configured: Configured) -> dict[str, Any]:
    """One of them, by any name that a request may have in `model`; nothing is loaded for it."""
    found = await service.look_up(name)
    registry, context_tokens = service.registry, service.info.context_tokens
    if isinstance(found, str):
        return available_model_object(found, registry, service.created, context_tokens)
    if not found.entries:
        return _base(service, configured)
    asked = parse_name(name.removeprefix(f"{registry.base}:"), registry.base)
    version = None if asked is None or asked.version is None else found.versions[0]
    return model_object(found.entries[0], registry, context_tokens, version)


def _base(service: AdapterService, configured: Settings) -> dict[str, Any]:
    """The base. A hub id is shown as the operator gave it, of a folder its name alone."""
    info = service.info
    is_folder = Path(configured.model).expanduser() == info.path
    root = info.model_id if is_folder else configured.model
    return base_model_object(service.registry, root, service.created, info.context_tokens)

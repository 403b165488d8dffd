"""`GET /v1/models`: the base, then each adapter as a model that descends from it. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from server.adapters.errors import UnknownModelError
from server.adapters.names import parse_name
from server.adapters.service import AdapterService
from server.adapters.views import base_model_object, model_object
from server.routes.dependencies import Adapters, settings
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["OpenAI"])

Configured = Annotated[Settings, Depends(settings)]


@router.get("")
async def list_models(service: Adapters, configured: Configured) -> dict[str, Any]:
    """The names that requests may use in `model`."""
    names = service.registry.served
    return {"object": "list", "data": [_object(name, service, configured.model) for name in names]}


@router.get("/{name:path}")
async def get_model(name: str, service: Adapters, configured: Configured) -> dict[str, Any]:
    """One of them; an adapter also as `<base>:<adapter>`, and a version that lives as `<adapter>@2`."""
    registry = service.registry
    served = registry.served
    found = name if name in served else name.removeprefix(f"{registry.base}:")
    if found in served and (found != registry.base or name == found):
        return _object(found, service, configured.model)
    asked = parse_name(found, registry.base)
    if asked is None or asked.version is None or asked.entry not in served:
        raise UnknownModelError(name, served)
    resolved = registry.resolve(found)
    return model_object(resolved.entries[0], registry, resolved.versions[0])


def _object(name: str, service: AdapterService, root: str) -> dict[str, Any]:
    registry = service.registry
    if name == registry.base:
        return base_model_object(registry, root, service.created, service.info.context_tokens)
    return model_object(registry.get(name), registry)

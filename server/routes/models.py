"""`GET /v1/models`: the base, then each adapter as a model that descends from it. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from server.adapters.errors import UnknownModelError
from server.adapters.service import AdapterService
from server.adapters.views import base_model_object, model_object
from server.routes.dependencies import adapter_service, settings
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["OpenAI"])

Service = Annotated[AdapterService, Depends(adapter_service)]
Configured = Annotated[Settings, Depends(settings)]


@router.get("")
async def list_models(service: Service, configured: Configured) -> dict[str, Any]:
    """The names that requests may use in `model`."""
    names = service.registry.served
    return {"object": "list", "data": [_object(name, service, configured.model) for name in names]}


@router.get("/{name:path}")
async def get_model(name: str, service: Service, configured: Configured) -> dict[str, Any]:
    """One of them; an adapter also as `<base>:<adapter>`."""
    served = service.registry.served
    found = name if name in served else name.removeprefix(f"{service.registry.base}:")
    if found not in served:
        raise UnknownModelError(name, served)
    return _object(found, service, configured.model)


def _object(name: str, service: AdapterService, root: str) -> dict[str, Any]:
    registry = service.registry
    if name == registry.base:
        return base_model_object(registry, root, service.created, service.info.context_tokens)
    return model_object(registry.get(name), registry)

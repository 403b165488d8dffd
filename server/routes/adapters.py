"""`/v1/adapters`: list, load, replace, unload, swap, fuse, unfuse. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.adapters.fusing import FuseResult, Precision
from server.adapters.service import AdapterService
from server.adapters.views import adapter_object
from server.json_body import JsonRoute
from server.routes.dependencies import adapter_service

__all__ = ["router"]

router = APIRouter(prefix="/v1/adapters", tags=["Adapters"], route_class=JsonRoute)

Service = Annotated[AdapterService, Depends(adapter_service)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class _Body(BaseModel):
    # An option that is misspelt would be lost without a word.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class LoadBody(_Body):
    """Which adapter is loaded, and how."""

    id: Text
    """Name under which requests use it: letters, digits, '.', '_', '-'; not the base's name."""
    path: Text | None = None
    """Folder, relative to the adapters root; the id when left out."""
    pinned: bool | None = None
    """Keep it loaded when memory is needed."""
    activate: bool = False
    """Make it what "default" means."""
    replace: bool = False
    """Load a new version if it is loaded; requests in flight finish on the old one."""


class SwapBody(_Body):
    """What "default" means from now on."""

    id: Text | None
    """An adapter, loaded first if need be; null for the base."""
    unload_previous: bool = False
    """Unload what was active before."""


class FuseBody(_Body):
    """How an adapter is fused."""

    precision: Precision = "auto"
    """How quantised layers are kept: quantised, dense, or quantised where that loses little."""
    unload_others: bool = False
    """Unload the other adapters, which cannot be used while one is fused."""
    save_to: Text | None = None
    """Write a complete model folder of this name under the models root, and leave the resident base alone."""


@router.get("")
async def list_adapters(service: Service) -> dict[str, Any]:
    """The adapters that are loaded, and the ids of those that could be."""
    listing = await service.list()
    return {
        "object": "list",
        "data": [adapter_object(entry, service.registry) for entry in listing.entries],
        "active": service.registry.active,
        "resident_bytes": listing.resident_bytes,
        "memory_limit_bytes": service.residency.limit_bytes,
        "available": listing.available,
    }


@router.post("", status_code=201, responses={200: {"description": "A new version of a loaded adapter"}})
async def load_adapter(body: LoadBody, service: Service, response: Response) -> dict[str, Any]:
    """Load an adapter, or a new version of one."""
    loaded = await service.load(
        body.id, body.path, pinned=body.pinned, activate=body.activate, replace=body.replace
    )
    response.status_code = 201 if loaded.created else 200
    return adapter_object(loaded.entry, service.registry)


@router.put("/active")
async def swap_adapter(body: SwapBody, service: Service) -> dict[str, Any]:
    """Change at one instant which adapter answers requests that name none."""
    swapped = await service.swap(body.id, body.unload_previous)
    return {
        "active": swapped.active,
        "previous": swapped.previous,
        "swap_seconds": round(swapped.swap_seconds, 6),
    }


@router.get("/{id}")
async def get_adapter(id: str, service: Service) -> dict[str, Any]:
    """One adapter."""
    return adapter_object(service.registry.get(id), service.registry)


@router.delete("/{id}")
async def unload_adapter(
    id: str,
    service: Service,
    timeout_seconds: Annotated[float | None, Query(ge=0, le=3600, allow_inf_nan=False)] = None,
) -> dict[str, Any]:
    """Unload an adapter once the requests that use it have finished."""
    entry, freed_bytes = await service.unload(id, timeout_seconds)
    return adapter_object(entry, service.registry) | {"freed_bytes": freed_bytes}


@router.post("/{id}/fuse")
async def fuse_adapter(id: str, service: Service, body: FuseBody | None = None) -> dict[str, Any]:
    """Fuse an adapter into the resident base, or into a copy of it on disk."""
    body = body or FuseBody()
    if body.save_to is not None:
        return _report(await service.save_fused(id, body.precision, body.save_to))
    return _report(await service.fuse(id, body.precision, body.unload_others))


@router.delete("/{id}/fuse")
async def unfuse_adapter(id: str, service: Service) -> dict[str, Any]:
    """Make the base, bit for bit, what it was before an adapter was fused into it."""
    return adapter_object(await service.unfuse(id), service.registry)


def _report(result: FuseResult) -> dict[str, Any]:
    """`precision` counts layers by what became of them; the errors are relative ones of the fused change."""
    report = result.report
    return {
        "id": result.id,
        "object": "adapter.fusion",
        "modules": report.modules,
        "precision": report.precision,
        "error_mean": report.error_mean,
        "error_worst": report.error_worst,
        "worst_module": report.worst_module,
        "seconds": round(result.seconds, 6),
        "saved_to": result.saved_to,
    }

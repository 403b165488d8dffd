"""`/v1/adapters`: list, load, replace, roll back, unload, swap. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.adapters.blending import Blender
from server.adapters.errors import AdapterNotFoundError, UnknownVersionError
from server.adapters.views import adapter_in_full, adapter_object
from server.json_body import JsonRoute
from server.routes.blending import BlendFields
from server.routes.bodies import Body, Scale, Text
from server.routes.dependencies import Adapters, blender, options_in_body

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/adapters",
    tags=["Adapters"],
    route_class=JsonRoute,
    dependencies=[Depends(options_in_body)],
)

Blends = Annotated[Blender, Depends(blender)]


class LoadBody(BlendFields):
    """Which adapter is loaded, or blended of others, and how."""

    id: Text
    """Name under which requests use it: letters, digits, '.', '_', '-'; not the base's name."""
    path: Text | None = None
    """Folder, relative to the adapters root; the id when left out."""
    scale: Scale | None = None
    """Factor of its change, in place of the one in its config in mlx-lm's format."""
    pinned: bool | None = None
    """Keep it loaded when memory is needed."""
    activate: bool = False
    """Make it what "default" means."""
    replace: bool = False
    """Load a new version if it is loaded; requests in flight finish on the old one."""


class SwapBody(Body):
    """What "default" means from now on."""

    id: Text | None
    """An adapter, loaded first if need be; null for the base."""
    unload_previous: bool = False
    """Unload what was active before."""


class UnloadQuery(BaseModel):
    """The query of an unload; a name that is misspelt is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    timeout_seconds: Annotated[float, Field(ge=0, le=3600)] | None = None


@router.get("")
async def list_adapters(service: Adapters) -> dict[str, Any]:
    """The adapters that are loaded, and the ids of those that could be."""
    listing = await service.list()
    return {
        "object": "list",
        "data": [adapter_object(entry, service.registry) for entry in listing.entries],
        "active": service.registry.active,
        "resident_bytes": listing.resident_bytes,
        "memory_limit_bytes": service.residency.limit_bytes,
        "available": listing.available,
        "checkpoints": listing.checkpoints,
    }


@router.post("", status_code=201, responses={200: {"description": "A new version of a loaded adapter"}})
async def load_adapter(
    body: LoadBody, service: Adapters, blends: Blends, response: Response
) -> dict[str, Any]:
    """Load an adapter from its folder, or blend one of others; or a new version of one."""
    wishes: Any = {"pinned": body.pinned, "activate": body.activate, "replace": body.replace}
    if body.blend is None:
        loaded = await service.load(body.id, body.path, scale=body.scale, **wishes)
    else:
        loaded = await blends.blend(body.id, body.terms, body.options, **wishes)
    response.status_code = 201 if loaded.created else 200
    return adapter_in_full(loaded.entry, service.registry, service.info)


@router.put("/active")
async def swap_adapter(body: SwapBody, service: Adapters) -> dict[str, Any]:
    """Change at one instant which adapter answers requests that name none."""
    swapped = await service.swap(body.id, body.unload_previous)
    return {
        "active": swapped.active,
        "previous": swapped.previous,
        "swap_seconds": round(swapped.swap_seconds, 6),
    }


@router.get("/{id:path}")
async def get_adapter(id: str, service: Adapters) -> dict[str, Any]:
    """One adapter, with the report on what was loaded; `{id}` may name a version that lives: `pirate@2`."""
    try:
        entry, version = service.registry.living(id)
    except UnknownVersionError as error:
        raise AdapterNotFoundError(str(error)) from error
    await service.look_for_checkpoints(entry)
    return adapter_in_full(entry, service.registry, service.info, None if id == entry.id else version)


@router.delete("/{id:path}")
async def unload_adapter(
    id: str, service: Adapters, query: Annotated[UnloadQuery, Query()]
) -> dict[str, Any]:
    """Unload an adapter once the requests that use it have finished."""
    entry, freed_bytes = await service.unload(id, query.timeout_seconds)
    return adapter_object(entry, service.registry) | {"freed_bytes": freed_bytes}


@router.post("/{id:path}/rollback")
async def roll_back_adapter(id: str, service: Adapters) -> dict[str, Any]:
    """Make an adapter's previous version the current one; requests in flight finish on theirs."""
    return adapter_in_full(await service.roll_back(id), service.registry, service.info)

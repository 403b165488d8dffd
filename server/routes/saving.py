"""`POST /v1/adapters/{id}/save`: what is loaded, as an adapter folder. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field

from adapters_core.formats.protocol import FormatName
from server.adapters.saving.adapters import AdapterSaver
from server.json_body import JsonRoute
from server.routes.bodies import Body, Text
from server.routes.dependencies import options_in_body, saver

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/adapters",
    tags=["Adapters"],
    route_class=JsonRoute,
    dependencies=[Depends(options_in_body)],
)


class SaveBody(Body):
    """Where an adapter is saved, and how."""

    save_to: Text
    """Name of the folder to make under the adapters root."""
    format: FormatName = "mlx"
    """Whose files are written: mlx-lm's or PEFT's."""
    version: Annotated[int, Field(ge=1)] | None = None
    """A version that lives; the current one when left out. `{id}` may name it as well: `pirate@2`."""


@router.post("/{id:path}/save")
async def save_adapter(
    id: str, body: SaveBody, adapters: Annotated[AdapterSaver, Depends(saver)]
) -> dict[str, Any]:
    """Write an adapter that is loaded, such as a blend or an older version, to a new adapter folder."""
    saved = await adapters.save(id, body.save_to, body.format, body.version)
    return {
        "id": saved.id,
        "object": "adapter.saved",
        "version": saved.version,
        "path": saved.name,
        "format": saved.format,
        "modules": saved.modules,
        "bytes": saved.size_bytes,
        "digest": saved.digest,
        "notes": list(saved.notes),
    }

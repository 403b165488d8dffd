"""`/v1/adapters/{id}/fuse`: fuse, save, unfuse. Runs on the event loop."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from adapters_core.fusing.fusion import Precision
from server.adapters.fusing.fuser import FuseResult
from server.adapters.fusing.progress import Tell, no_tell
from server.adapters.views import adapter_object
from server.json_body import JsonRoute
from server.routes.bodies import Body, Text
from server.routes.dependencies import Adapters, options_in_body
from server.routes.progress import with_progress

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/adapters",
    tags=["Adapters"],
    route_class=JsonRoute,
    dependencies=[Depends(options_in_body)],
)


Weight = Annotated[float, Field(ge=-100, le=100)]


class WeightedAdapter(Body):
    """One more adapter of a sum."""

    id: Text
    """A loaded adapter."""
    weight: Weight = 1.0
    """What its change is multiplied with."""


class FuseBody(Body):
    """How an adapter is fused."""

    precision: Precision = "auto"
    """How adapted layers are stored: `requantize` quantises them again, as the base is; `dequantize` makes
    them dense; `keep` leaves them and puts the adapter beside them; `auto` takes the smallest plain form that
    keeps the adapter."""
    weight: Weight = 1.0
    """What the adapter's change is multiplied with."""
    adapters: list[WeightedAdapter] = Field(default=[], max_length=64)
    """Others that are fused with it: the sum of all their changes, each times its weight."""
    unload_others: bool = False
    """Unload the adapters that are not fused, which cannot be used while the base is fused."""
    save_to: Text | None = None
    """Write a complete model folder of this name under the models root, and leave the resident base alone."""
    stream: bool = False
    """Tell the progress as server-sent events; the last one is the report."""


@router.post("/{id:path}/fuse")
async def fuse_adapter(id: str, service: Adapters, body: FuseBody | None = None) -> Response:
    """Fuse an adapter, or a sum of several, into the resident base, or into a copy of it on disk."""
    body = body or FuseBody()
    terms = [(id, body.weight), *((other.id, other.weight) for other in body.adapters)]

    async def work(tell: Tell) -> dict[str, Any]:
        if body.save_to is not None:
            return _report(await service.save_fused(terms, body.precision, body.save_to, tell))
        return _report(await service.fuse(terms, body.precision, body.unload_others, tell))

    if body.stream:
        return await with_progress(work)
    return JSONResponse(await work(no_tell))


@router.delete("/{id:path}/fuse")
async def unfuse_adapter(id: str, service: Adapters) -> dict[str, Any]:
    """Make the base, bit for bit, what it was before an adapter was fused into it."""
    return adapter_object(await service.unfuse(id), service.registry)


def _report(result: FuseResult) -> dict[str, Any]:
    """`precision` counts layers by what became of them; the errors are relative ones of the fused change."""
    report = result.report
    return {
        "id": result.id,
        "object": "adapter.fusion",
        "adapters": [{"id": adapter_id, "weight": weight} for adapter_id, weight in result.terms],
        "modules": report.modules,
        "precision": report.precision,
        "threshold": report.threshold,
        "error_mean": report.error_mean,
        "error_worst": report.error_worst,
        "worst_module": report.worst_module,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "activations": asdict(result.activations),
        "seconds": round(result.seconds, 6),
        "saved_to": result.saved_to,
    }

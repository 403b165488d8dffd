"""`/health`, `/ready`, `/version`, `/metrics`. The first two are open, for probes. Runs on the event loop."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import mlx.core as mx
from fastapi import APIRouter, Depends, Request, Response

from server.auth import require_api_key
from server.engine.engine import Engine
from server.errors import ApiError
from server.resources import lacking
from server.routes.dependencies import engine, settings
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(tags=["Health"])

Thread = Annotated[Engine, Depends(engine)]

_KEY = [Depends(require_api_key)]
_PACKAGES = {"version": "mlx-graft", "mlx": "mlx", "mlx_lm": "mlx-lm"}


@router.get("/health")
async def health(thread: Thread, configured: Annotated[Settings, Depends(settings)]) -> dict[str, Any]:
    """Whether the generation thread gives signs of life."""
    limit_seconds = configured.health_timeout_seconds
    if not thread.alive:
        raise _unavailable("The generation thread has ended.", "engine_stopped")
    if thread.beat_age_seconds > limit_seconds:
        raise _unavailable(
            f"The generation thread gave no sign of life for {thread.beat_age_seconds:.0f} s; "
            f"at most {limit_seconds:g} s are expected.",
            "engine_stuck",
        )
    return {"status": "ok"}


@router.get("/ready")
async def ready(thread: Thread) -> dict[str, Any]:
    """Whether requests are taken: the model is there and answers, and the system gives what it needs."""
    if not thread.ready:
        raise _unavailable("The server is stopping and takes no more requests.", "not_ready")
    thread.container.require_alive()
    if (reason := lacking()) is not None:
        raise _unavailable(reason, "out_of_resources")
    return {"status": "ready"}


@router.get("/version", dependencies=_KEY)
async def version(thread: Thread) -> dict[str, Any]:
    """The versions of what computes, on what kind of device, and in which forms it computes adapters."""
    found = {name: _version_of(package) for name, package in _PACKAGES.items()}
    forms = thread.info.forms
    return {
        **found,
        "device": mx.default_device().type.name,
        "forms": None if forms is None else asdict(forms),
    }


@router.get("/metrics", dependencies=_KEY, response_class=Response)
async def metrics(request: Request) -> Response:
    """Measurements for Prometheus."""
    body, content_type = request.app.state.metrics.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


def _version_of(package: str) -> str | None:
    """None for a package that is not installed, as this one when it runs from its checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code)

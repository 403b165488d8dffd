"""The application: settings in, ASGI out. Its lifespan starts and stops everything that a request needs.

No state outside the application object: its parts are in `app.state` (settings, metrics, connections,
engine, adapters, text_service, comparison_service), from where dependencies hand them to routes. Runs on the
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import mlx.core as mx
import structlog
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.middleware import Middleware

from server.adapters.blending import Blender
from server.adapters.folder import AdapterFolders, configured_folders
from server.adapters.memory.budget import default_memory_bytes
from server.adapters.saving.adapters import AdapterSaver
from server.adapters.service import AdapterService, ServiceOptions
from server.auth import require_api_key
from server.bodies import BodyLimits, BodyMiddleware
from server.connections import ConnectionLimits, Connections
from server.engine.calibration import with_forms
from server.engine.engine import Engine
from server.engine.loop import LoopOptions
from server.engine.memory_limits import headroom_bytes, return_freed_memory
from server.engine.model import ModelInfo, load_model
from server.errors import install
from server.leftovers import sweep_cache, sweep_folders
from server.metrics import Metrics, MetricsMiddleware
from server.middleware import (
    HostGuardMiddleware,
    RequestIdMiddleware,
    UnexpectedErrorMiddleware,
)
from server.openai.comparing import ComparisonService
from server.openai.service import TextService
from server.routes import adapters as adapter_routes
from server.routes import chat, compare, compat, completions, fusing, health, models, saving
from server.settings import Settings
from server.urls import UrlMiddleware

__all__ = ["create_app"]

# For the step that is under way when all requests are given up; who waits for it is told without it.
_GRACE_SECONDS = 1.0

_KEY = [Depends(require_api_key)]


_log = structlog.get_logger(__name__)


class ErrorObject(BaseModel):
    """What went wrong. `param` names the part of the request that is at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None
    details: Any = Field(default=None, description="More, where an endpoint says so.")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorObject


def create_app(
    settings: Settings, engine: Engine | None = None, adapters: AdapterService | None = None
) -> FastAPI:
    """The application for `settings`; `engine` and `adapters` replace those that they describe.

    Its start raises what stops it: ModelLoadError, InvalidAdapterError and their like.
    """
    connections = Connections(ConnectionLimits(settings.max_connections, settings.head_timeout_seconds))
    metrics = Metrics(connections)
    app = FastAPI(
        title="mlx-graft",
        description="One resident base model; adapters chosen, blended, swapped and fused per request.",
        lifespan=_lifespan(settings, engine or _make_engine(settings), adapters, metrics),
        middleware=_middleware(settings, metrics),
        # The document is a route like any other, guarded, and the viewers would load scripts from elsewhere.
        openapi_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.connections = connections
    install(app)
    # An id may hold slashes: what follows one in a URL is looked for first.
    for guarded in (chat, compare, completions, models, fusing, saving, adapter_routes, compat):
        app.include_router(guarded.router, dependencies=_KEY)
    app.include_router(health.router)  # open, but for what it guards itself

    @app.get("/openapi.json", dependencies=_KEY, include_in_schema=False)
    async def openapi_document() -> JSONResponse:
        return JSONResponse(app.openapi())

    return app


def _make_engine(settings: Settings) -> Engine:
    options = LoopOptions(
        max_batch_size=settings.max_batch_size,
        prefill_batch_size=settings.prefill_batch_size,
        prefill_step_tokens=settings.prefill_step_tokens,
        max_batch_adapters=settings.max_batch_adapters,
        warm=True,
    )
    return_freed_memory()
    return Engine(
        lambda: with_forms(
            load_model(settings.model, dtype=settings.dtype, revision=settings.revision),
            settings.cache_dir,
            measured=settings.calibration,
        ),
        options,
        prompt_cache_bytes=settings.prompt_cache_bytes,
        max_waiting=settings.max_waiting,
        memory_limit=lambda: settings.kv_memory_bytes or _free_for_rows(settings),
        grace_seconds=_GRACE_SECONDS,
        stuck_seconds=settings.health_timeout_seconds,
    )


def _free_for_rows(settings: Settings) -> int:
    """Bytes that are left beside the base and the adapters, less a fifth for all that is not counted."""
    return max(0, headroom_bytes() - _adapter_memory_bytes(settings)) * 4 // 5


def _adapter_memory_bytes(settings: Settings) -> int:
    return settings.adapter_memory_bytes or default_memory_bytes()


def _make_adapters(settings: Settings, engine: Engine, info: ModelInfo, metrics: Metrics) -> AdapterService:
    root = settings.adapters_dir
    options = ServiceOptions(
        memory_bytes=_adapter_memory_bytes(settings),
        wait_seconds=settings.adapter_wait_seconds,
        max_waiting=settings.max_batch_size + settings.max_waiting,  # all that the engine would take
        load_on_demand=settings.load_on_demand,
        unload_timeout_seconds=settings.unload_timeout_seconds,
        models_dir=settings.models_dir,
        fuse_threshold=settings.fuse_threshold,
        kept_dir=settings.cache_dir / "versions",
        kept_bytes=settings.kept_versions_bytes,
        watched_dir=root if settings.watch else None,
        settle_seconds=settings.watch_settle_seconds,
    )
    folders = AdapterFolders(root, configured_folders(settings.adapters, root), settings.adapter_scales)
    base = settings.served_model_name or info.model_id
    on_cpu = mx.default_device().type == mx.DeviceType.cpu

    def is_held_up() -> bool:
        return on_cpu and engine.stats.running_rows > 0

    on_load = metrics.load_seconds.observe
    return AdapterService(engine.container, info, base, folders, options, on_load, is_held_up)


def _lifespan(
    settings: Settings, engine: Engine, adapters: AdapterService | None, metrics: Metrics
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            info = await engine.start()
            # By now the server has waited for its requests, or given them up.
            stack.push_async_callback(engine.stop, 0.0)
            await asyncio.to_thread(_sweep, settings)
            service = adapters or _make_adapters(settings, engine, info, metrics)
            stack.push_async_callback(service.close)
            stack.push_async_callback(engine.stop_if_hanging)  # for the changes that wait for the thread
            await service.start(settings.adapters)
            text_service = TextService(
                engine,
                service,
                info,
                default_max_tokens=settings.default_max_tokens,
                max_n=settings.max_n,
            )
            stack.callback(text_service.close)
            metrics.watch(engine, service)
            app.state.engine = engine
            app.state.adapters = service
            app.state.blender = Blender(service)
            app.state.saver = AdapterSaver(service, settings.adapters_dir)
            app.state.text_service = text_service
            app.state.comparison_service = ComparisonService(engine, service, text_service)
            yield

    return lifespan


def _sweep(settings: Settings) -> None:
    """Remove what earlier processes left half-written when they were killed."""
    roots = [root for root in (settings.adapters_dir, settings.models_dir) if root is not None]
    if swept := sweep_folders(roots) + sweep_cache(settings.cache_dir):
        _log.info("leftovers_removed", count=len(swept), names=[path.name for path in swept[:10]])


def _middleware(settings: Settings, metrics: Metrics) -> Sequence[Middleware]:
    """Outermost first."""
    # As browsers write them, which send no slash at the end.
    origins = [origin.lower().rstrip("/") for origin in settings.cors_origins]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],
        # Chrome asks before a public page may reach a private address.
        allow_private_network=True,
        expose_headers=["x-request-id", "retry-after", "x-should-retry"],
    )
    bodies = BodyLimits(settings.max_body_bytes, settings.body_memory_bytes, settings.body_timeout_seconds)
    return [
        Middleware(RequestIdMiddleware),
        Middleware(MetricsMiddleware, metrics=metrics),
        Middleware(BodyMiddleware, limits=bodies),
        Middleware(
            HostGuardMiddleware,
            allowed_hosts=settings.allowed_hosts,
            allowed_origins=settings.cors_origins,
        ),
        *([cors] if settings.cors_origins else []),
        Middleware(UnexpectedErrorMiddleware),
        Middleware(UrlMiddleware),
    ]

"""What is measured, for Prometheus: HTTP requests, loads, and how the engine and the adapters are doing now.

One registry for each application, nothing in the module. Every label has few values: routes, never paths or
ids from a request. Runs on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.adapters.service import AdapterService
from server.connections import REFUSALS, Connections
from server.engine.engine import Engine

__all__ = ["Metrics", "MetricsMiddleware"]

_REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_LOAD_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """The measurements of one application; `connections` are those of the server that it runs under."""

    def __init__(self, connections: Connections) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "graft_http_requests",
            "HTTP requests by route and status; status 'left' if the client left before the answer began.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "graft_http_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ["method", "route"],
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self.load_seconds = Histogram(
            "graft_adapter_load_seconds",
            "Seconds that loading an adapter took.",
            buckets=_LOAD_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Connections(connections))

    def watch(self, engine: Engine, adapters: AdapterService) -> None:
        """Tell of these from now on; call it once."""
        self.registry.register(_Now(engine, adapters))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Everything, and its content type, in the form that an Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _Connections:
    """Reads the connections when it is asked."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        connections = self._connections
        yield _gauge("graft_connections", "Connections that are open.", connections.open)
        yield _gauge("graft_waiting_connections", "Those without a request.", connections.waiting)
        refused = CounterMetricFamily(
            "graft_refused_connections", "Connections that were refused or cut.", labels=["reason"]
        )
        for reason in REFUSALS:
            refused.add_metric([reason], connections.refused[reason])
        yield refused


class _Now:
    """Reads the engine and the adapters when it is asked."""

    def __init__(self, engine: Engine, adapters: AdapterService) -> None:
        self._engine = engine
        self._adapters = adapters

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_metrics()
        yield from self._adapter_metrics()

    def _engine_metrics(self) -> Iterator[Metric]:
        stats, cache = self._engine.stats, self._engine.stats.prompt_cache
        yield _gauge("graft_running_rows", "Rows that are decoded together now.", stats.running_rows)
        yield _gauge("graft_running_requests", "Requests that are computed now.", stats.running_requests)
        yield _gauge("graft_waiting_requests", "Requests that wait.", self._engine.waiting_requests)
        yield _gauge(
            "graft_batch_adapters",
            "Different adapters of the requests that are computed.",
            stats.batch_adapters,
        )
        yield _gauge(
            "graft_engine_beat_age_seconds",
            "Seconds since the generation thread's last sign of life.",
            self._engine.beat_age_seconds,
        )
        yield _counter("graft_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield _counter(
            "graft_cached_tokens", "Those of them that were not computed again.", stats.cached_tokens
        )
        yield _counter("graft_completion_tokens", "Tokens that were generated.", stats.completion_tokens)
        yield _gauge("graft_scoring_rows", "Rows of answers that are scored now.", stats.scoring_rows)
        yield _counter("graft_scored_tokens", "Tokens of answers that were scored.", stats.scored_tokens)
        yield _counter("graft_failed_requests", "Requests that the engine gave up.", stats.failures)
        yield _counter("graft_prompt_cache_hits", "Prompts whose beginning was cached.", cache.hits)
        yield _counter("graft_prompt_cache_misses", "Prompts whose beginning was not cached.", cache.misses)
        yield _counter(
            "graft_prompt_cache_evictions", "Cached prompts that went for want of room.", cache.evictions
        )
        yield _gauge("graft_prompt_cache_entries", "Prompts that are cached.", cache.entries)
        yield _gauge("graft_prompt_cache_bytes", "Bytes that they take.", cache.bytes_held)

    def _adapter_metrics(self) -> Iterator[Metric]:
        registry, residency = self._adapters.registry, self._adapters.residency
        versions = sum(len(entry.versions) for entry in registry.entries)
        yield _gauge("graft_adapters", "Adapters that are registered.", len(registry.entries))
        yield _gauge("graft_adapter_versions", "Their versions, with old ones still in use.", versions)
        yield _gauge("graft_resident_adapters", "Versions in memory.", len(residency.versions))
        yield _gauge("graft_adapter_bytes", "Bytes of those in memory.", residency.bytes_held)
        yield _gauge("graft_adapter_memory_limit_bytes", "Bytes that they may take.", residency.limit_bytes)
        kept_bytes = self._adapters.keeper.bytes_held
        yield _gauge("graft_kept_version_bytes", "Bytes on disk of copies of versions.", kept_bytes)
        yield _counter(
            "graft_adapter_evictions", "Versions that left memory for others.", residency.evictions
        )
        yield _counter(
            "graft_adapter_cold_loads", "Versions that came back into memory.", residency.cold_loads
        )
        yield _gauge(
            "graft_base_fused", "Whether an adapter is fused into the base.", registry.fused is not None
        )
        yield _gauge("graft_pinned_requests", "Requests from name to last token.", registry.in_flight)
        resolved = CounterMetricFamily(
            "graft_resolved_requests", "Requests by what they are computed with.", labels=["kind"]
        )
        for kind in ("base", "adapter", "blend"):
            resolved.add_metric([kind], registry.totals[kind])
        yield resolved


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


class MetricsMiddleware:
    """Counts and times requests, streams to their end. Plain ASGI; hands everything through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = "left"

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, count)
        finally:
            method, route = _labels(scope)
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(method, route).observe(time.perf_counter() - started)


def _labels(scope: Scope) -> tuple[str, str]:
    """The method and the route of a request, each out of few: a client chooses neither at will.

    Routing leaves the route in the scope, also where the route does not have the method.
    """
    found = scope.get("route")
    route = getattr(found, "path_format", None)  # without the kinds of its parameters
    if route is None:
        return "any", "none"
    return (scope["method"] if scope["method"] in (getattr(found, "methods", None) or ()) else "other"), route

"""Named blends: several adapters and weights become one, which is served as if it had been loaded.

The parts are read again, as they were loaded, on a worker thread beside the generation; they need not be in
memory, and stay what they are. One blend is computed at a time, for it holds whole matrices; until it is done
nothing has changed, and it goes on to its end whoever waits. Knows no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog

from adapters_core.blending.blend import BlendOptions, BlendReport, problem_of_dora, problems_unread
from adapters_core.errors import InvalidBlendError

from .blended import Blended, Part, make_blend
from .changes import Wishes
from .errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    LifeCycleError,
    UnknownCheckpointError,
    UnknownModelError,
    UnknownVersionError,
    quoted,
    some_of,
)
from .folder import check_id
from .names import parse_name
from .pins import Terms
from .service import AdapterService, Loaded

__all__ = ["Blender"]

_log = structlog.get_logger(__name__)


class Blender:
    """Makes adapters of `service` out of others."""

    def __init__(self, service: AdapterService) -> None:
        self._service = service
        self._turn = asyncio.Lock()

    async def blend(
        self,
        adapter_id: str,
        terms: Terms,
        options: BlendOptions,
        *,
        pinned: bool | None = None,
        activate: bool = False,
        replace: bool = False,
    ) -> Loaded:
        """Make `adapter_id`, or with `replace` its next version, of `terms`: (id or id@version, weight).

        Parts that are not registered are loaded on demand. On failure everything is as before.

        Raises:
            InvalidBlendError: the adapters cannot be blended so; every problem is listed.
            AdapterNotFoundError: a part is not served, nor a folder that could be.
            BlendPartChangedError: a part's folder does not hold what was loaded from it.
            And as `AdapterService.load_made`.
        """
        options = _with_seed(options)
        if problems := problems_unread(terms, options):  # then nothing is loaded, and no turn waited for
            raise InvalidBlendError(problems + self._problems_of_loaded(terms))
        self._refuse_at_once(adapter_id, replace)
        parts = tuple([await self._part(name, weight) for name, weight in terms])
        wishes = Wishes(pinned, activate, replace)
        return await self._service.to_the_end(self._make(adapter_id, parts, options, wishes))

    async def _make(
        self, adapter_id: str, parts: tuple[Part, ...], options: BlendOptions, wishes: Wishes
    ) -> Loaded:
        started = time.perf_counter()
        async with self._turn:
            model = await self._service.bare_model(_refusal(adapter_id))
            made = await self._service.aside.run(make_blend, parts, options, model)
        seconds = time.perf_counter() - started
        _log.info("adapter_blended", adapter=adapter_id, method=options.method, seconds=round(seconds, 3))
        source = Blended(_recipe(parts, options, made.report, seconds), parts, options)
        return await self._service.load_made(
            adapter_id,
            source,
            made.modules,
            pinned=wishes.pinned,
            activate=wishes.activate,
            replace=wishes.replace,
        )

    def _refuse_at_once(self, adapter_id: str, replace: bool) -> None:
        """What loading would refuse anyway, before anything is computed."""
        registry = self._service.registry
        check_id(adapter_id, registry.base)
        registry.refuse_if_fused(_refusal(adapter_id))
        if registry.find(adapter_id) is not None and not replace:
            raise AdapterExistsError(adapter_id)

    def _problems_of_loaded(self, terms: Terms) -> list[str]:
        """What is known to be wrong with parts without reading any."""
        registry, found = self._service.registry, list[str]()
        for text, weight in terms:
            with suppress(LifeCycleError):  # it is not loaded, or not in this version
                version = registry.living(text)[1]
                if weight and version.resident.type == "dora":
                    found.append(problem_of_dora(text))
        return found

    async def _part(self, text: str, weight: float) -> Part:
        """The version that `text` names now."""
        registry = self._service.registry
        text = text.removeprefix(f"{registry.base}:")
        name = parse_name(text, registry.base)
        try:
            if name is not None and registry.find(name.entry) is None:
                (await self._service.resolve(text)).release()
            version = registry.resolve(None, [(text, 1.0)]).versions[0]
        except UnknownModelError:
            raise _not_found(text, registry.served) from None
        except (UnknownVersionError, UnknownCheckpointError) as error:
            error.param = "blend"
            raise
        return Part(text, weight, version)


def _refusal(adapter_id: str) -> str:
    return f"{quoted(adapter_id)} cannot be blended"


def _not_found(text: str, served: Sequence[str]) -> AdapterNotFoundError:
    error = AdapterNotFoundError(
        f"There is no adapter {quoted(text)} to blend. There are: {some_of(served[1:])}."
    )
    error.param = "blend"
    return error


def _with_seed(options: BlendOptions) -> BlendOptions:
    """The seed that is drawn from, so that clients see it."""
    draws = options.method.startswith("dare") and options.seed is None
    return replace(options, seed=0) if draws else options


def _recipe(
    parts: Sequence[Part], options: BlendOptions, report: BlendReport, seconds: float
) -> Mapping[str, Any]:
    """What clients see of a blend; the errors are what its rank leaves out, relative to the merged deltas."""
    return {
        "method": options.method,
        "density": options.density,
        "rank": options.rank,
        "seed": options.seed,
        "parts": [
            {
                "id": part.id,
                "weight": part.weight,
                "version": part.version.number,
                "digest": part.version.resident.digest,
            }
            for part in parts
        ],
        "error_mean": report.error_mean,
        "error_worst": report.error_worst,
        "worst_module": report.worst_module,
        "seconds": round(seconds, 6),
    }

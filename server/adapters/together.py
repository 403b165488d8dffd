"""Several names resolved as of one instant. Runs on the event loop."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import Pin
from .service import AdapterService

__all__ = ["resolve_together"]


async def resolve_together(adapters: AdapterService, models: Sequence[str]) -> list[Pin]:
    """What each of `models` computes with, all as of the instant at which this returns, in their order.

    Loading one may take a while, in which another's name may come to mean something else: that one is then
    resolved again. The caller releases each pin.

    Raises: as `AdapterService.resolve`; then nothing is kept.
    """
    pins: dict[str, Pin] = {}
    try:
        while True:
            for model in models:
                if model not in pins:
                    pins[model] = await adapters.resolve(model)
            # From here to the end nothing is awaited: this is the instant.
            changed = [name for name, pin in pins.items() if adapters.registry.resolve(name).row != pin.row]
            if not changed:
                return [pins[model] for model in models]
            for name in changed:
                pins.pop(name).release()
    except BaseException:
        for pin in pins.values():
            pin.release()
        raise

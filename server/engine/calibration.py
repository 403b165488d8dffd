"""Which form rows are computed with on this device: measured once for a model's shapes, and kept on disk.

Called on the generation thread, once the model is loaded and before requests are taken.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import structlog
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters_core.calibration import REGIMES, Calibration, calibrate
from adapters_core.errors import AdapterError
from adapters_core.files import replacing
from adapters_core.mixed.routing import Routing
from server.environment import describe_environment

__all__ = ["kept_or_measured"]

_log = structlog.get_logger(__name__)
_F = TypeVar("_F")

_MOST_BYTES = 1 << 16


class _Kept(BaseModel):
    """What the file holds. `key` says what was measured, for people: the file's name has its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str]
    chosen: dict[str, str]
    seconds: dict[str, dict[str, float]]


def kept_or_measured(
    model: nn.Module,
    forms: Mapping[str, _F],
    use: Callable[[Routing, _F], None],
    folder: Path,
) -> dict[str, str]:
    """By regime, the name of one of `forms`, the first being the default; as `calibrate` measures it.

    What was found is kept in `folder`, for this device, the shapes of the model and these versions. A file
    that cannot be used is measured again, one that cannot be written is told in the log.
    """
    if len(forms) == 1:
        return {regime.name: next(iter(forms)) for regime in REGIMES}
    key = _key(model, forms)
    name = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    kept = _read(file, key, forms)
    if kept is not None:
        _log.info("forms as measured before", **_told(kept.chosen))
        return kept.chosen
    start = time.perf_counter()
    try:
        found = calibrate(model, forms, use)
    except AdapterError as error:
        _log.warning("forms are not measured, the defaults are used", reason=str(error))
        return {regime.name: next(iter(forms)) for regime in REGIMES}
    mx.clear_cache()
    seconds = round(time.perf_counter() - start, 2)
    _log.info("forms measured", seconds=seconds, **_told(found.chosen))
    _write(file, key, found)
    return found.chosen


def _key(model: nn.Module, forms: Mapping[str, object]) -> dict[str, str]:
    environment = describe_environment()
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    shapes = [(path, str(array.dtype), array.shape) for path, array in arrays]
    return {
        "device": f"{environment.device}, {environment.processor}",
        "model": f"{type(model).__module__} {hashlib.sha256(repr(shapes).encode()).hexdigest()}",
        "mlx": metadata.version("mlx"),
        "mlx-graft": environment.packages["mlx-graft"],
        "forms": ", ".join(forms),
        "regimes": ", ".join(regime.name for regime in REGIMES),
    }


def _read(file: Path, key: Mapping[str, str], forms: Mapping[str, object]) -> _Kept | None:
    """What was kept for `key`; None if there is nothing, or nothing that can be used."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_MOST_BYTES)
        kept = _Kept.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        _log.warning("the file of a measurement is damaged and is made again", reason=type(error).__name__)
        return None
    is_whole = kept.chosen.keys() == {regime.name for regime in REGIMES}
    if kept.key != key or not is_whole or not set(kept.chosen.values()) <= forms.keys():
        return None
    return kept


def _write(file: Path, key: dict[str, str], found: Calibration) -> None:
    kept = _Kept(key=key, chosen=found.chosen, seconds=found.seconds)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        _log.warning("what was measured cannot be kept", reason=error.strerror or str(error))


def _told(chosen: Mapping[str, str]) -> dict[str, str]:
    return {name.replace(" ", "_"): form for name, form in chosen.items()}

"""Which form rows are computed with on this device: measured once for a model's shapes, and kept on disk.

Called on the generation thread, once the model is loaded and before requests are taken.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import structlog
from mlx.utils import tree_flatten
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters_core.calibration import REGIMES, calibrate
from adapters_core.errors import AdapterError
from adapters_core.files import replacing
from adapters_core.mixed.forms import Form, Forms, forms_of
from adapters_core.mixed.kernel import on_cuda
from server.environment import describe_environment

from .model import LoadedModel

__all__ = ["choose_forms", "kept_or_measured", "with_forms"]

_log = structlog.get_logger(__name__)

_MOST_BYTES = 1 << 16


class _Kept(BaseModel):
    """What the file holds. `key` says what was measured, for people: the file's name has its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str]
    forms: Forms
    seconds: dict[str, dict[str, float]]


def with_forms(loaded: LoadedModel, cache_dir: Path, *, measured: bool = True) -> LoadedModel:
    """`loaded`, and in its description how rows with adapters are to be computed."""
    forms = choose_forms(loaded.model, cache_dir, measured=measured)
    return replace(loaded, info=replace(loaded.info, forms=forms))


def choose_forms(model: nn.Module, cache_dir: Path, *, measured: bool = True) -> Forms:
    """The forms for `model` on this device: as measured, or its defaults."""
    forms = forms_of(on_cuda=on_cuda())
    return kept_or_measured(model, forms, cache_dir / "calibration") if measured else Forms.all(forms[0])


def kept_or_measured(model: nn.Module, forms: Sequence[Form], folder: Path) -> Forms:
    """The forms to compute with, of `forms`, the first being the default; as `calibrate` measures them.

    What was found is kept in `folder`, for this device, the shapes of the model and these versions. A file
    that cannot be used is measured again, one that cannot be written is told in the log.
    """
    if len(forms) == 1:
        return Forms.all(forms[0])
    key = _key(model, forms)
    file = folder / f"{hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:24]}.json"
    kept = _read(file, key)
    if kept is not None:
        _log.info("forms as measured before", **asdict(kept.forms))
        return kept.forms
    start = time.perf_counter()
    try:
        found = calibrate(model, forms)
    except AdapterError as error:
        _log.warning("forms are not measured, the defaults are used", reason=str(error))
        return Forms.all(forms[0])
    mx.clear_cache()
    _log.info("forms measured", seconds=round(time.perf_counter() - start, 2), **asdict(found.forms))
    _write(file, _Kept(key=key, forms=found.forms, seconds=found.seconds))
    return found.forms


def _key(model: nn.Module, forms: Sequence[Form]) -> dict[str, str]:
    environment = describe_environment()
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    shapes = [(path, str(array.dtype), array.shape) for path, array in arrays]
    return {
        "device": f"{environment.device}, {environment.processor}",
        "model": f"{type(model).__module__} {hashlib.sha256(repr(shapes).encode()).hexdigest()}",
        "mlx": environment.packages["mlx"],
        "mlx-graft": environment.packages["mlx-graft"],
        "forms": ", ".join(forms),
        "regimes": ", ".join(map(str, REGIMES)),
    }


def _read(file: Path, key: Mapping[str, str]) -> _Kept | None:
    """What was kept for `key`; None if there is nothing, or nothing that can be used."""
    try:
        with file.open("rb") as opened:
            kept = _Kept.model_validate_json(opened.read(_MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        _log.warning("the file of a measurement is damaged and is made again", reason=type(error).__name__)
        return None
    return kept if kept.key == key else None


def _write(file: Path, kept: _Kept) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        _log.warning("what was measured cannot be kept", reason=error.strerror or str(error))

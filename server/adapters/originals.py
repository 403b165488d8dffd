"""The adapter as a version has it: what fusing, blending and saving start from. Runs on a worker thread."""

from __future__ import annotations

from contextlib import suppress

import mlx.nn as nn

from adapters_core.container import AdapterContainer
from adapters_core.errors import AdapterError

from .errors import AdapterChangedError, LifeCycleError
from .source import Made, Source, read_folder
from .versions import Version

__all__ = ["read_source", "read_version"]


def read_version(version: Version, model: nn.Module, name: str) -> AdapterContainer:
    """The adapter that `version` is, from its private copy, else from where it came.

    `model` is the bare base, for what is made again; `name` is how errors call it.

    Raises:
        AdapterChangedError: neither holds it any more.
        InvalidAdapterError: there is no copy, and the folder holds no adapter.
        AdapterNotReadableError: there is no copy, and what was made cannot be made again.
    """
    copy = version.copy  # the event loop may give it up meanwhile
    if copy is not None:
        with suppress(OSError, RuntimeError, ValueError, AdapterError, LifeCycleError):
            adapter = copy.container(name)
            if adapter.digest == version.resident.digest:
                return adapter
    adapter = read_source(version.source, model, name)
    if adapter.digest != version.resident.digest:
        raise AdapterChangedError(name)
    return adapter


def read_source(source: Source, model: nn.Module, name: str) -> AdapterContainer:
    """What a source gives now; whoever asks compares digests. Raises as `read_version`."""
    return source.make_again(model, name) if isinstance(source, Made) else read_folder(source)

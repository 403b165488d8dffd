"""What a blend was made of, and how it is made (again): the same parts give the same weights.

A part is known by its digest, not by its name: what is read from its folder has to be what was blended, or it
is refused. Knows no names but to show them. What reads and computes runs on a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from adapters_core.blending.blend import BlendOptions, BlendPart, BlendReport, blend
from adapters_core.container import AdapterContainer

from .errors import BlendPartChangedError
from .memory.loading import read_folder
from .source import Made, Source, folder_of

__all__ = ["Blended", "Part", "make_blend", "read_source"]


@dataclass(frozen=True, slots=True)
class Part:
    """A version in a blend: what the client called it, its weight, its content and where that comes from."""

    id: str
    weight: float
    version: int
    digest: str
    source: Source


@dataclass(frozen=True, eq=False, slots=True)
class Blended(Made):
    """A source that can be made again, as long as its parts can be read."""

    parts: tuple[Part, ...]
    options: BlendOptions


def make_blend(
    parts: Sequence[Part], options: BlendOptions, model: nn.Module, name: str
) -> tuple[AdapterContainer, BlendReport]:
    """The adapter that `parts` make together over `model`, and how well its rank holds it.

    Raises:
        InvalidBlendError: they cannot be blended so; every problem is listed.
        BlendPartChangedError: a folder does not hold what was loaded from it.
        InvalidAdapterError: a folder holds no adapter any more.
        AdapterNotReadableError: a part was made in memory, and not by blending.
    """
    read = [BlendPart(part.id, part.weight, _read_part(part, model).check(model)) for part in parts]
    made = blend(read, options)
    return AdapterContainer.from_weights(made.modules, name), made.report


def read_source(source: Source, model: nn.Module, name: str) -> AdapterContainer:
    """What a version came from, read or made again; whoever asks compares digests. Raises as `make_blend`."""
    if isinstance(source, Blended):
        return make_blend(source.parts, source.options, model, name)[0]
    return read_folder(folder_of(source))


def _read_part(part: Part, model: nn.Module) -> AdapterContainer:
    adapter = read_source(part.source, model, part.id)
    if adapter.digest != part.digest:
        raise BlendPartChangedError(part.id)
    return adapter

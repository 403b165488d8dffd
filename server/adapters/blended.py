"""What a blend was made of, and how it is made (again): the same parts give the same weights.

A part is a version, not a name: what is read again has to be what was blended, or it is refused. Knows no
names but to show them. What reads and computes runs on a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from adapters_core.blending.blend import Blend, BlendOptions, BlendPart, blend
from adapters_core.container import AdapterContainer

from .errors import AdapterChangedError, BlendPartChangedError
from .originals import read_version
from .source import Made
from .versions import Version

__all__ = ["Blended", "Part", "make_blend"]


@dataclass(frozen=True, slots=True)
class Part:
    """A version in a blend, what the client called it, and its weight."""

    id: str
    weight: float
    version: Version


@dataclass(frozen=True, eq=False, slots=True)
class Blended(Made):
    """A source that can be made again, as long as its parts can be read."""

    parts: tuple[Part, ...]
    options: BlendOptions

    def make_again(self, model: nn.Module, name: str) -> AdapterContainer:
        """As it was made. Raises as `make_blend`."""
        return AdapterContainer.from_weights(make_blend(self.parts, self.options, model).modules, name)


def make_blend(parts: Sequence[Part], options: BlendOptions, model: nn.Module) -> Blend:
    """The adapter that `parts` make together over `model`, and how well its rank holds it.

    Raises:
        InvalidBlendError: they cannot be blended so; every problem is listed.
        BlendPartChangedError: a folder does not hold what was loaded from it.
        InvalidAdapterError: a folder holds no adapter any more.
        AdapterNotReadableError: a part was made in memory, and not by blending.
    """
    read = [BlendPart(part.id, part.weight, _read_part(part, model).check(model)) for part in parts]
    return blend(read, options)


def _read_part(part: Part, model: nn.Module) -> AdapterContainer:
    try:
        return read_version(part.version, model, part.id)
    except AdapterChangedError:
        raise BlendPartChangedError(part.id) from None

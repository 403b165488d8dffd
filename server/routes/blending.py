"""The fields of `POST /v1/adapters` that ask for a blend instead of a folder. Pure; knows no adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from adapters_core.blending.blend import MAX_PARTS, BlendMethod, BlendOptions
from server.routes.bodies import Body

__all__ = ["BlendFields", "BlendTerm"]

_OPTIONS = ("method", "density", "rank", "seed")
_OF_FOLDERS = ("path", "scale")


class BlendTerm(Body):
    """An adapter in a blend."""

    id: Annotated[str, Field(min_length=1, max_length=300)]
    """An adapter, one of its versions (`id@2`) or checkpoints (`id@step-100`); `base:` may precede."""
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """The factor that its change gets."""


class BlendFields(Body):
    """How adapters are blended. Which options go with which method is checked where they are used."""

    blend: Annotated[list[BlendTerm], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    """Adapters to be made into one, instead of a folder to be loaded."""
    method: BlendMethod | None = None
    """`linear` (the default) is the exact sum, `svd` the sum cut to a rank; docs/blends.md has all."""
    density: float | None = None
    """The share of each change's entries that `ties` and `dare` keep: above 0, at most 1."""
    rank: int | None = None
    """The rank of the result, but for `linear`; the largest of the adapters when left out."""
    seed: int | None = None
    """What `dare` draws from; 0 when left out."""

    @model_validator(mode="after")
    def _check_blend(self) -> BlendFields:
        if self.blend is None:
            for name in _OPTIONS:
                if getattr(self, name) is not None:
                    raise _problem(name, "is allowed only together with 'blend'")
        elif given := next((name for name in _OF_FOLDERS if getattr(self, name, None) is not None), None):
            raise _problem(given, "cannot be given together with 'blend'")
        elif len({term.id for term in self.blend}) < len(self.blend):
            raise _problem("blend", "should name each adapter once")
        return self

    @property
    def terms(self) -> list[tuple[str, float]]:
        """(id, weight) of each adapter."""
        return [(term.id, term.weight) for term in self.blend or ()]

    @property
    def options(self) -> BlendOptions:
        """How they are blended."""
        return BlendOptions(self.method or "linear", self.density, self.rank, self.seed)


def _problem(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("blend", message, {"param": param})  # type: ignore[arg-type]

"""What bodies of the management calls have in common. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.near import named, nearest
from server.validation import UNKNOWN

__all__ = ["Body", "Scale", "Text"]

Scale = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Body(BaseModel):
    """A body in which an option that is misspelt, or of another type, is refused: else it would be lost."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _tell_what_was_meant(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields and (meant := nearest(name, cls.model_fields)) is not None:
                message = f"{named(name)} is not a field of this call. Did you mean {named(meant)}?"
                raise PydanticCustomError(UNKNOWN, "{what}", {"what": message, "param": name})
        return given

"""What bodies of the management calls have in common. Pure."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Body", "Text"]

Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Body(BaseModel):
    """A body in which an option that is misspelt, or of another type, is refused: else it would be lost."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

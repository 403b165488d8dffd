"""How the products of rows with different adapters are computed, and which ways a device has. Pure.

A row's factors lie in stacks. `gather_mm` reads them from there; or they are copied together first, and one
batched product follows. Which is faster depends on the device and on the size of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["MANY_ROWS", "Form", "Forms", "forms_of"]

MANY_ROWS = 16
"""So many rows, and more, are many."""


class Form(StrEnum):
    """A way to multiply each row with its own factors."""

    GATHER = "gather"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Forms:
    """The form for batches that decode, with few rows and with many, and for those that read prompts.

    A field's name is that of its regime. Where a type has no `gather_mm`, factors are copied all the same.
    """

    decoding_few: Form
    decoding_many: Form
    reading: Form

    @classmethod
    def all(cls, form: Form) -> Forms:
        """The same form for every regime."""
        return cls(form, form, form)

    def copies(self, rows: int, tokens: int) -> bool:
        """Whether factors are copied for a batch of `rows` that each have `tokens`."""
        if tokens > 1:
            return self.reading is Form.COPY
        return (self.decoding_few if rows < MANY_ROWS else self.decoding_many) is Form.COPY


def forms_of(*, on_cuda: bool) -> tuple[Form, ...]:
    """The forms that a device has, its default first.

    On CUDA, MLX compiles `gather_mm` for half a minute at its first use, and takes it for granted that
    matrices lie packed one after the other, which those in a stack do not.
    """
    return (Form.COPY,) if on_cuda else (Form.GATHER, Form.COPY)

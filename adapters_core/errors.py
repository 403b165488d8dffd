"""The tree of errors that adapters can raise.

AdapterError
├── InvalidAdapterError    a folder, file or config that does not hold an adapter, or not one for this model
├── FolderChangedError     a folder that somebody changed while it was read; another try may find it at rest
├── OutsideRootError       a folder or file that lies outside of the root in which it has to lie
├── UnsupportedModelError  a model that cannot be adapted, or not served in mixed batches
├── ContainerStateError    a call out of turn: load twice, unload what is not loaded
└── BlendError             weights that the adapters of a row do not allow
    └── InvalidBlendError  adapters, weights and options that make no adapter together
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "BlendError",
    "ContainerStateError",
    "FolderChangedError",
    "InvalidAdapterError",
    "InvalidBlendError",
    "OutsideRootError",
    "UnsupportedModelError",
    "grouped",
    "named",
    "quoted",
]

_SHOWN_CHARS = 80
_SHOWN_OF_A_KIND = 3
# What differs between problems of one kind: the names of modules and tensors, and numbers.
_OWN = re.compile(r"[\w-]*(?:\.[\w*-]+)+|\d+")


def quoted(text: str) -> str:
    """`text`, from a file or a request, as one line of printable ASCII in quotes, cut to 80 characters."""
    return ascii(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")


def named(text: str) -> str:
    """`text`, a name from a file, as it is if it is short and printable, else as `quoted` shows it."""
    return text if text.isprintable() and len(text) <= _SHOWN_CHARS else quoted(text)


def grouped(problems: Sequence[str]) -> list[str]:
    """The first three of each kind of `problems`, and how many more there are, in their order.

    A kind is a sentence without the names and numbers in it.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_OWN.sub("#", problem), []).append(problem)
    told: list[str] = []
    for kind in kinds.values():
        told += kind[:_SHOWN_OF_A_KIND]
        if (more := len(kind) - _SHOWN_OF_A_KIND) > 0:
            told[-1] += f" (and {more} more like this)"
    return told


class AdapterError(Exception):
    """Anything that this package raises on purpose."""


class InvalidAdapterError(AdapterError):
    """An adapter that cannot be used, with everything that is wrong with it.

    `source` names the folder, file or model it came from (no absolute path); `problems` holds one
    sentence each, never empty, and `causes` what is behind many of them, if that can be told. The message
    has the causes and the first problems of each kind (`grouped`).
    """

    def __init__(self, source: str, problems: Sequence[str], causes: Sequence[str] = ()) -> None:
        self.source = source
        self.problems = tuple(problems)
        self.causes = tuple(causes)
        shown = "; ".join(self.told)
        super().__init__(f"adapter {source!r} cannot be used ({len(self.problems)} problem(s)): {shown}")

    @property
    def told(self) -> list[str]:
        """What a person reads."""
        return [*self.causes, *grouped(self.problems)]

    @property
    def details(self) -> list[str]:
        """All that is known."""
        return [*self.causes, *self.problems]


class FolderChangedError(AdapterError):
    """A folder, or a file in it, that somebody changed while it was read, so that nothing was made of it.

    `source` is its name.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(f"{quoted(source)} changed while it was read; try again when it is at rest")


class OutsideRootError(AdapterError):
    """A folder or file, called `source`, that lies outside of the root in which it has to lie."""

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(f"{quoted(source)} lies outside of the folder in which adapters have to lie")


class UnsupportedModelError(AdapterError):
    """A model that this package cannot adapt or serve; `reasons` says why."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(grouped(self.reasons)))


class ContainerStateError(AdapterError):
    """A call that the state of a container or bank does not allow."""


class BlendError(AdapterError):
    """A combination of adapters and weights that cannot be computed exactly."""


class InvalidBlendError(BlendError):
    """Adapters that cannot be made into one, with everything that is wrong.

    `problems` holds one sentence each, never empty; each begins with the option or the module concerned.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(grouped(self.problems)))

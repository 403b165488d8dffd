"""The tree of errors that adapters can raise.

AdapterError
├── InvalidAdapterError    a folder, file or config that does not hold an adapter, or not one for this model
├── UnsupportedModelError  a model that cannot be adapted, or not served in mixed batches
├── ContainerStateError    a call out of turn: load twice, unload what is not loaded
└── BlendError             weights that the adapters of a row do not allow
    └── InvalidBlendError  adapters, weights and options that make no adapter together
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "BlendError",
    "ContainerStateError",
    "InvalidAdapterError",
    "InvalidBlendError",
    "UnsupportedModelError",
]


class AdapterError(Exception):
    """Anything that this package raises on purpose."""


class InvalidAdapterError(AdapterError):
    """An adapter that cannot be used, with everything that is wrong with it.

    `source` names the folder, file or model it came from (no absolute path); `problems` holds one
    sentence each, never empty.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        shown = "; ".join(self.problems)
        super().__init__(f"adapter {source!r} cannot be used ({len(self.problems)} problem(s)): {shown}")


class UnsupportedModelError(AdapterError):
    """A model that this package cannot adapt or serve; `reasons` says why."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


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
        super().__init__("; ".join(self.problems))

"""The tree of errors that the adapters' life cycle raises, each with the facts that a reply needs.

LifeCycleError
├── InvalidAdapterIdError   400, an id that no adapter may have
├── AdaptersWithModelError  400, `model` names an adapter and `adapters` are given as well
├── VersionsDifferError     400, a name that names one version, and a number that names another
├── UnmergedModelError      400, a model folder that should hold layers which are not merged
├── PathNotAllowedError     403, a path that leads out of its root
├── UnknownModelError       404, a name in a request that nothing is served under
├── UnknownVersionError     404, a version in a request that does not live (any more)
├── UnknownCheckpointError  404, no such checkpoint, or adapter, and a training that wrote some
├── AdapterNotFoundError    404, an id or a folder that is not there
├── VersionGoneError        404, the private copy of a version is not what was kept
├── AdapterExistsError      409
├── AdapterBusyError        409, requests in flight did not end in time
├── BaseIsFusedError        409, an adapter is fused into the base
├── AdapterChangedError     409, its folder does not hold any more what was loaded from it
├── BlendPartChangedError   409, likewise, of an adapter that was to be blended
├── AdapterNotFusedError    409
├── AdapterNotReadableError 409, it was not read from a folder, so none can be read
├── NoPreviousVersionError  409, nothing to roll back to
├── AdaptersLoadedError     409, others are loaded
├── ModelExistsError        409, a folder that would be overwritten
├── AdapterFolderExistsError 409, likewise, of an adapter
├── AdapterNotWritableError 422, an adapter that a format cannot say
├── AdapterChangingError    503, its folder is being written
├── VersionUnreadableError  503, the private copy of a version cannot be read now
├── AdapterMemoryBusyError  503, adapters in use left no room in memory for long, or too many wait
├── AdapterMemoryError      507, more than memory for adapters can hold
├── VersionNotKeptError     507, a version without a folder could not be copied aside
├── ModelNotSavedError      507, a model folder could not be written
└── AdapterNotSavedError    507, likewise, an adapter's

No message holds an absolute path, and what a client sent is quoted on one line and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from adapters_core.errors import grouped

__all__ = [
    "AdapterBusyError",
    "AdapterChangedError",
    "AdapterChangingError",
    "AdapterExistsError",
    "AdapterFolderExistsError",
    "AdapterMemoryBusyError",
    "AdapterMemoryError",
    "AdapterNotFoundError",
    "AdapterNotFusedError",
    "AdapterNotReadableError",
    "AdapterNotSavedError",
    "AdapterNotWritableError",
    "AdaptersLoadedError",
    "AdaptersWithModelError",
    "BaseIsFusedError",
    "BlendPartChangedError",
    "InvalidAdapterIdError",
    "LifeCycleError",
    "ModelExistsError",
    "ModelNotSavedError",
    "NoPreviousVersionError",
    "PathNotAllowedError",
    "UnknownCheckpointError",
    "UnknownModelError",
    "UnknownVersionError",
    "UnmergedModelError",
    "VersionGoneError",
    "VersionNotKeptError",
    "VersionUnreadableError",
    "VersionsDifferError",
    "quoted",
    "some_of",
]

_SHOWN_CHARS = 80
_SHOWN_NAMES = 20


def quoted(text: str) -> str:
    """`text` as one line of printable characters in quotes, cut to a few words."""
    return ascii(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown or "none"


class LifeCycleError(Exception):
    """Anything that this package raises on purpose.

    `status` is the nearest HTTP status, `code` a short constant word, `param` the field that is at fault,
    `details` something to put beside the message.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    param: str | None = None
    details: Any = None


class InvalidAdapterIdError(LifeCycleError):
    status, code, param = 400, "invalid_adapter_id", "id"

    def __init__(self, adapter_id: str, reason: str) -> None:
        super().__init__(f"{quoted(adapter_id)} cannot be an adapter's id: {reason}.")


class AdaptersWithModelError(LifeCycleError):
    status, code, param = 400, "adapters_with_adapter_model", "adapters"

    def __init__(self, model: str, base: str, param: str = "adapters") -> None:
        super().__init__(
            f"'model' names the adapter {quoted(model)}, and '{param}' is given as well: "
            f"with '{param}', name the base {quoted(base)} or leave 'model' out."
        )
        self.model, self.base, self.param = model, base, param


class VersionsDifferError(LifeCycleError):
    status, code, param = 400, "versions_differ", "version"

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{quoted(name)} names a version, and 'version' names another, {number}: name one.")


class UnmergedModelError(LifeCycleError):
    status, code, param = 400, "not_mergeable", "precision"

    def __init__(self) -> None:
        super().__init__(
            'With "precision": "keep", the adapter stays beside the base\'s weights, which no model folder '
            'can hold. Save with "auto" or "dequantize", or serve the adapter\'s own folder.'
        )


class PathNotAllowedError(LifeCycleError):
    status, code, param = 403, "path_not_allowed", "path"


class UnknownModelError(LifeCycleError):
    status, code, param = 404, "model_not_found", "model"

    def __init__(self, name: str, served: Sequence[str], param: str = "model") -> None:
        super().__init__(f"The model {quoted(name)} is not served here. Served are: {some_of(served)}.")
        self.param = param


class UnknownVersionError(LifeCycleError):
    """Of `adapter_id`, the versions `living` can be named, and not the one that was."""

    status, code, param = 404, "model_not_found", "model"

    def __init__(self, adapter_id: str, number: int | None, living: Sequence[int], param: str) -> None:
        names = [f"{adapter_id}@{each}" for each in living]
        super().__init__(
            f"Adapter {quoted(adapter_id)} has no version {number}, or has it no more. "
            f"Served are: {some_of(names)}."
        )
        self.param = param


class UnknownCheckpointError(LifeCycleError):
    """`name` is not there; the training that writes adapter `adapter_id` has written `steps`, upwards."""

    status, code = 404, "model_not_found"

    def __init__(self, name: str, adapter_id: str, steps: Sequence[int], param: str) -> None:
        names = [f"{adapter_id}@step-{step}" for step in reversed(steps)]
        super().__init__(
            f"There is no {quoted(name)} to be loaded. Its folder holds checkpoints: {some_of(names)}."
        )
        self.param = param


class AdapterNotFoundError(LifeCycleError):
    status, code = 404, "adapter_not_found"


class VersionGoneError(LifeCycleError):
    status, code = 404, "version_gone"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"The version with digest {digest} lives no more: its private copy has gone or is damaged. If it "
            'has a folder, load what that holds with "replace": true; if it was blended, blend it anew.'
        )


class AdapterExistsError(LifeCycleError):
    status, code, param = 409, "adapter_exists", "id"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f'Adapter {quoted(adapter_id)} is loaded. Send "replace": true for a new version.')


class AdapterBusyError(LifeCycleError):
    """`in_flight` requests still use what was to be changed; nothing was."""

    status, code = 409, "adapter_busy"

    def __init__(self, message: str, in_flight: int) -> None:
        super().__init__(message)
        self.details = {"in_flight": in_flight}


class BaseIsFusedError(LifeCycleError):
    """`fused` is the adapter by which the fusion is known; `terms` (id, weight) are those of a sum."""

    status, code = 409, "base_is_fused"

    def __init__(self, fused: str, refused: str, terms: Sequence[tuple[str, float]] = ()) -> None:
        if terms:
            parts = ", ".join(f"{quoted(adapter_id)} x {weight:g}" for adapter_id, weight in terms)
            now = (
                f"A sum of adapters ({parts}), for which only the base's name stands, is fused into the base"
            )
        else:
            now = f"Adapter {quoted(fused)} is fused into the base"
        super().__init__(f"{now}, so {refused}. Unfuse it first: DELETE /v1/adapters/{fused}/fuse.")
        parts_of_it = [{"id": adapter_id, "weight": weight} for adapter_id, weight in terms]
        self.details = {"fused": fused, **({"adapters": parts_of_it} if terms else {})}


class AdapterChangedError(LifeCycleError):
    status, code = 409, "adapter_changed"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(
            f"What was read from the folder of adapter {quoted(adapter_id)} is not what is served. If the "
            "adapter was just replaced, try again. Else put the files that were loaded back into the folder, "
            'or load what it holds now with "replace": true.'
        )


class BlendPartChangedError(LifeCycleError):
    status, code, param = 409, "adapter_changed", "blend"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(
            f"What was loaded as adapter {quoted(adapter_id)} cannot be read any more: there is no private "
            "copy of it, and its folder, or those of what it was blended from, hold something else. Put the "
            'files that were loaded back, or load what is there now with "replace": true and blend that.'
        )


class AdapterNotFusedError(LifeCycleError):
    status, code = 409, "adapter_not_fused"

    def __init__(self, adapter_id: str, fused: str | None) -> None:
        now = "no adapter is" if fused is None else f"{quoted(fused)} is"
        super().__init__(f"Adapter {quoted(adapter_id)} is not fused into the base; {now}.")


class AdapterNotReadableError(LifeCycleError):
    status, code = 409, "adapter_not_readable"

    def __init__(self) -> None:
        super().__init__("This version was made from other adapters in memory, so there is no folder of it.")


class NoPreviousVersionError(LifeCycleError):
    status, code = 409, "no_previous_version"

    def __init__(self, adapter_id: str, number: int) -> None:
        super().__init__(
            f"Adapter {quoted(adapter_id)} has no version to go back to: its version {number} is the only "
            "one that lives."
        )


class AdaptersLoadedError(LifeCycleError):
    status, code = 409, "adapters_loaded"

    def __init__(self, adapter_id: str, others: Sequence[str]) -> None:
        super().__init__(
            f"Fusing {quoted(adapter_id)} would change the base under other adapters: {some_of(others)}. "
            'Unload them first, or send "unload_others": true.'
        )
        self.details = {"adapters": list(others)}


class ModelExistsError(LifeCycleError):
    status, code, param = 409, "model_exists", "save_to"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is a {quoted(name)} under the models root already; choose another name.")


class AdapterFolderExistsError(LifeCycleError):
    status, code, param = 409, "adapter_folder_exists", "save_to"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is a {quoted(name)} under the adapters root already; choose another name.")


class AdapterNotWritableError(LifeCycleError):
    """`problems` are all reasons why the format `to` cannot say what the adapter is."""

    status, code, param = 422, "adapter_not_writable", "format"

    def __init__(self, adapter_id: str, to: str, problems: Sequence[str]) -> None:
        super().__init__(
            f"Adapter {quoted(adapter_id)} cannot be written as {to}, for {len(problems)} reason(s): "
            f"{'; '.join(grouped(problems))}. Try the other format, {'peft' if to == 'mlx' else 'mlx'}."
        )
        self.details = list(problems)


class AdapterChangingError(LifeCycleError):
    status, code = 503, "adapter_changing"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(
            f"Adapter {quoted(adapter_id)} has left memory, and its folder is being written. Try again when "
            "that has ended."
        )


class VersionUnreadableError(LifeCycleError):
    status, code = 503, "version_unreadable"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"The private copy of the version with digest {digest} cannot be read now, and is kept. Try "
            "again; the server's log says why."
        )


class AdapterMemoryBusyError(LifeCycleError):
    """What a request names did not come into memory in time, or too many wait for that already."""

    status, code = 503, "adapter_memory_busy"

    @classmethod
    def in_vain(cls, waited_seconds: float) -> Self:
        """Nothing fitted beside what requests in flight use, for all of `waited_seconds`."""
        return cls(
            f"For {waited_seconds:.1f} s, adapters in use by other requests left no room in memory for those "
            "that this request names. Try again later, or raise the server's adapter_memory_bytes or "
            "adapter_wait_seconds."
        )

    @classmethod
    def crowded(cls, waiting: int) -> Self:
        """As many as may are waiting."""
        return cls(
            f"{waiting} requests wait for adapters to come into memory already, as many as may. Try again "
            "later, or raise the server's max_waiting or adapter_memory_bytes."
        )


class AdapterMemoryError(LifeCycleError):
    """What was asked for needs `needed_bytes` with what must stay in memory, of `limit_bytes`."""

    status, code = 507, "adapter_memory_exceeded"

    def __init__(self, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"With what has to stay in memory, adapters would take {needed_bytes} bytes, of {limit_bytes} "
            "allowed. Unload one that is pinned or in use, or raise the server's adapter_memory_bytes."
        )
        self.details = {"needed_bytes": needed_bytes, "limit_bytes": limit_bytes}


class VersionNotKeptError(LifeCycleError):
    status, code = 507, "version_not_kept"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(
            f"Adapter {quoted(adapter_id)} would have no folder, and the server could not keep a copy of it "
            "on disk. Raise the server's kept_versions_bytes, or make room for its cache_dir."
        )


class ModelNotSavedError(LifeCycleError):
    status, code, param = 507, "model_not_saved", "save_to"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The model {quoted(name)} could not be written: {reason}. Nothing of it is left.")


class AdapterNotSavedError(LifeCycleError):
    status, code, param = 507, "adapter_not_saved", "save_to"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The adapter {quoted(name)} could not be written: {reason}. Nothing of it is left.")

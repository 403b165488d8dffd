"""Both files of an adapter's folder, read and checked by themselves: which format, its config, its tensors.

The config decides by its content: PEFT's has `peft_type`, and nothing that mlx-lm's has. The weights of each
format lie in a file of its own name. Knows no model and does not import mlx-lm, which takes seconds. Runs on
any thread.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..config import CONFIG_FILE, AdapterConfig, read_values
from ..config_history import is_mlx
from ..errors import AdapterError, FolderChangedError, InvalidAdapterError
from ..open_folder import OpenFolder, opened
from .peft.config import PeftConfig
from .peft.targets import named_by_tensors
from .weights import PEFT_WEIGHTS_FILE, WEIGHTS_FILE, AdapterWeights, least_file_bytes, read_weights
from .wrong_files import told_by_names

__all__ = ["least_memory_bytes", "read_files"]


_SCALE_ADVICE = (
    "scale: PEFT's config has the factor of every module, as lora_alpha and r, and no other can be given for "
    "all; a request can weight the whole adapter"
)


def read_files(
    folder: OpenFolder, weights_file: str | None = None, scale: float | None = None
) -> tuple[AdapterConfig | PeftConfig, AdapterWeights]:
    """What is in `folder`; the tensors are those of `weights_file`, or of the format's own file.

    `scale` stands in place of that in a config in mlx-lm's format.

    Raises:
        InvalidAdapterError: naming the folder and every problem of both files; because of an OSError, if one
            cannot be read.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`; or the files do not belong together.
    """
    problems: list[str] = []
    cause: BaseException | None = None
    values: object = None
    config: AdapterConfig | PeftConfig | None = None
    weights = None
    try:
        values = read_values(folder)
        config = _config(values, folder.name, scale)
    except InvalidAdapterError as error:
        problems, cause = [*problems, *error.problems], cause or error.__cause__
    try:
        weights = read_weights(folder, weights_file or _own_file(values))
    except InvalidAdapterError as error:
        problems, cause = [*problems, *error.problems], cause or error.__cause__
    if config is None or weights is None:
        if folder.has_changed:  # what is missing may have been there a moment ago
            raise FolderChangedError(folder.name) from cause
        causes = _what_is_there(folder, values, None if cause else weights_file or _own_file(values))
        raise InvalidAdapterError(folder.name, problems, causes) from cause
    folder.refuse_changed()
    if isinstance(config, PeftConfig):
        config = named_by_tensors(config, weights.tensors)
    return config, weights


def _what_is_there(folder: OpenFolder, values: object, weights_file: str | None) -> list[str]:
    """What lies in the folder instead of a file that is missing."""
    names: list[str] = []
    with suppress(OSError):
        names = folder.names()
    if weights_file is None or not {CONFIG_FILE, weights_file}.difference(names):
        return []
    return told_by_names(names, is_peft=_is_peft(values) if CONFIG_FILE in names else None)


def least_memory_bytes(
    directory: str | Path | OpenFolder, weights_file: str | None = None, copies_bytes: int = 0
) -> int:
    """Bytes that the adapter in `directory` takes beside any base at the very least; reads no tensors.

    Of the file that `read_files` would read, of which up to `copies_bytes` may be the base's own weights. 0
    if that cannot be told: reading it will say what is wrong.
    """
    with suppress(OSError, ValueError, RecursionError, AdapterError), opened(directory) as folder:
        name = weights_file or _own_file(read_values(folder))
        return least_file_bytes(folder, name, copies_bytes)
    return 0


def _own_file(values: object) -> str:
    return PEFT_WEIGHTS_FILE if _is_peft(values) else WEIGHTS_FILE


def _config(values: object, source: str, scale: float | None) -> AdapterConfig | PeftConfig:
    if isinstance(values, dict) and _is_peft(values):
        if scale is not None:
            raise InvalidAdapterError(source, [_SCALE_ADVICE])
        return PeftConfig.from_values(values, source)
    return AdapterConfig.from_values(values, source, scale)


def _is_peft(values: object) -> bool:
    return isinstance(values, dict) and not is_mlx(values)

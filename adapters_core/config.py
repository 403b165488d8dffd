"""adapter_config.json: read, checked and written without loss.

Fields that this package does not use (mlx-lm writes its training options there) are kept as they are.
Knows no tensors and no model. Runs on any thread.
"""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)

from .config_history import LAYERS_BEFORE, MAX_SCALE, is_mlx, read_today
from .errors import InvalidAdapterError, named
from .files import replacing
from .open_folder import OpenFolder, opened
from .starts import told_by_start

__all__ = [
    "CONFIG_FILE",
    "MAX_CONFIG_BYTES",
    "MAX_RANK",
    "AdapterConfig",
    "FineTuneType",
    "LoRAParameters",
    "read_values",
    "shown",
]

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096
_MAX_LAYERS = 100_000
_MAX_NESTING = 64

_BASE_FIELDS = ("model", "base_model_name_or_path")
_HEEDED = (LAYERS_BEFORE, "use_dora", "peft_type")
_VLM_FIELDS = frozenset({"rank", "alpha"})

_Key = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=512)]

# What each field has to be, for the messages.
_EXPECTED = {
    "fine_tune_type": '"lora" or "dora"',
    "num_layers": f"a whole number up to {_MAX_LAYERS} (-1 for all layers)",
    "lora_parameters": "an object with rank, scale, dropout and keys",
    "lora_parameters.rank": f"a whole number from 1 to {MAX_RANK}",
    "lora_parameters.scale": f"a finite number between -{MAX_SCALE:g} and {MAX_SCALE:g}",
    "lora_parameters.dropout": "a number from 0 to below 1",
    "lora_parameters.keys": "null, or a list with at least one module path",
    "lora_parameters.keys.[]": "a module path (a string of 1 to 512 characters)",
}


class FineTuneType(StrEnum):
    """The kinds of adapters: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

    LORA = "lora"
    DORA = "dora"


class LoRAParameters(BaseModel):
    """The low-rank update s·B A, with A of `rank` rows.

    `keys` are module paths, None stands for all linear layers.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    rank: int = Field(default=8, ge=1, le=MAX_RANK, strict=True)
    scale: float = Field(default=10.0, ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False, strict=True)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False, strict=True)
    keys: list[_Key] | None = Field(default=None, min_length=1)


class AdapterConfig(BaseModel):
    """What adapter_config.json says.

    `num_layers` counts from the last layer; any number <= 0 means all, as in mlx-lm. Keys are paths
    relative to a layer, or full paths in the model.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    fine_tune_type: FineTuneType = FineTuneType.LORA
    num_layers: int = Field(default=16, ge=-_MAX_LAYERS, le=_MAX_LAYERS, strict=True)
    lora_parameters: LoRAParameters = Field(default_factory=LoRAParameters)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def base_name(self) -> str | None:
        """The base that it was trained on: `model`, as mlx-lm's trainer has it, else as Unsloth's."""
        extra = self.model_extra or {}
        named = (extra.get(name) for name in _BASE_FIELDS)
        return next((name for name in named if isinstance(name, str) and name), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What may have been meant otherwise, a sentence each, for the load report."""
        return self._notes

    @property
    def has_todays_layers(self) -> bool:
        """Whether `num_layers` was written under this name."""
        return LAYERS_BEFORE not in (self.model_extra or {})

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields with a value that do not change what the adapter computes: those of its training."""
        extra = dict(self.model_extra or {})
        for name in (*_BASE_FIELDS, *_HEEDED):
            extra.pop(name, None)
        extra["lora_parameters.dropout"] = self.lora_parameters.dropout
        for name, value in (self.lora_parameters.model_extra or {}).items():
            extra[f"lora_parameters.{name}"] = value
        with_value = (name for name, value in extra.items() if value not in (None, "", [], {}, 0))
        return tuple(sorted(map(named, with_value)))

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read `adapter_config.json` in `directory`.

        Raises:
            InvalidAdapterError: it is missing or wrong; every problem is listed.
        """
        with opened(directory) as folder:
            return cls.from_values(read_values(folder), folder.name)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read the file at `path`, at most 1 MiB of JSON.

        Raises:
            InvalidAdapterError: it is missing or wrong; every problem is listed.
        """
        path = Path(path)
        with opened(path.parent) as folder:
            values = read_values(folder, path.name, path.name)
        return cls.from_values(values, path.name)

    @classmethod
    def from_values(cls, values: object, source: str, scale: float | None = None) -> Self:
        """Check `values`, as JSON gives them and as any version of mlx-lm wrote them.

        `scale` stands in place of `lora_parameters.scale`.

        Raises:
            InvalidAdapterError: naming `source` and every problem.
        """
        if not isinstance(values, dict):
            raise InvalidAdapterError(source, [f"{CONFIG_FILE}: expected a JSON object, got {_kind(values)}"])
        if not is_mlx(values):
            raise InvalidAdapterError(source, [_PEFT_ADVICE])
        if values.keys() >= _VLM_FIELDS and "lora_parameters" not in values:
            raise InvalidAdapterError(source, [_VLM_ADVICE])
        reading = read_today(values, scale)
        values = reading.values
        problems = [f"{CONFIG_FILE}: {problem}" for problem in reading.problems] + _advice(values)
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            is_full = values.get("fine_tune_type") == "full"
            # mlx-lm writes null for the parameters of a whole model.
            advised = {"fine_tune_type"} if is_full else set[str]()
            advised |= {"lora_parameters"} if is_full and values.get("lora_parameters") is None else set()
            problems += [
                problem
                for details in error.errors(include_url=False, include_context=False)
                if (problem := _problem(details["loc"], details["input"], advised))
            ]
            raise InvalidAdapterError(source, problems) from None
        if problems:
            raise InvalidAdapterError(source, problems)
        config._notes = tuple(f"{CONFIG_FILE}: {note}" for note in reading.notes)
        return config

    def to_values(self) -> dict[str, JsonValue]:
        """The JSON object to write: every field with its value, and all that was kept."""
        # Not mode="json", which would turn numbers that JSON lacks into null.
        values = self.model_dump()
        values["fine_tune_type"] = self.fine_tune_type.value
        if "keys" not in self.lora_parameters.model_fields_set:
            del values["lora_parameters"]["keys"]
        return values

    def write(self, path: str | Path) -> None:
        """Write to `path` in full or not at all.

        Raises:
            OSError: the file cannot be written.
            ValueError, TypeError: a kept value is not a JSON value.
        """
        text = json.dumps(self.to_values(), indent=4, allow_nan=False) + "\n"
        with replacing(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")


_PEFT_ADVICE = (
    f"{CONFIG_FILE}: this is the config of a PEFT adapter (it has peft_type); "
    "expected mlx-lm's format (fine_tune_type, num_layers, lora_parameters)"
)
_FULL_ADVICE = (
    f'{CONFIG_FILE}: fine_tune_type is "full": these are weights of a whole model, not an adapter. '
    "Serve the folder as a model instead: `mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path MODEL` "
    "makes one"
)
_ALPHA_ADVICE = (
    f"{CONFIG_FILE}: lora_parameters has alpha but no scale; expected scale, the factor of the update "
    "itself (alpha / rank in other tools). Write it into the file, or load the adapter with a scale"
)
_VLM_ADVICE = (
    f"{CONFIG_FILE}: this is the config of an adapter of an older mlx-vlm (rank, alpha and dropout, and no "
    "lora_parameters), whose tensors have other names (A, B). Train it again with an mlx-vlm that writes "
    "lora_parameters, or fuse it into its base with mlx-vlm and serve that"
)


def _advice(values: dict[str, Any]) -> list[str]:
    """Problems that deserve better than the general message."""
    problems = []
    if values.get("fine_tune_type") == "full":
        problems.append(_FULL_ADVICE)
    parameters = values.get("lora_parameters")
    if isinstance(parameters, dict) and "alpha" in parameters and "scale" not in parameters:
        problems.append(_ALPHA_ADVICE)
    return problems


def _problem(location: tuple[int | str, ...], value: object, advised: set[str]) -> str | None:
    name = ".".join("[]" if isinstance(part, int) else part for part in location)
    if name in advised:
        return None
    place = ".".join(str(part) for part in location)
    return f"{CONFIG_FILE}: {place}: expected {_EXPECTED.get(name, 'a JSON value')}, got {shown(value)}"


def shown(value: object) -> str:
    """`value`, that of a known field, as JSON, cut to 80 characters, for messages."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(values: object) -> str:
    """What a whole file holds, of which no more is to be told."""
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(values), "null")


def read_values(folder: OpenFolder, file_name: str = CONFIG_FILE, source: str | None = None) -> object:
    """What the JSON file of this name in an open folder holds.

    Raises:
        InvalidAdapterError: naming `source` (the folder): it is missing, not JSON, over 1 MiB, or nests too
            deeply; because of an OSError, if it cannot be read.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`.
    """

    def refuse(problem: str) -> InvalidAdapterError:
        return InvalidAdapterError(source or folder.name, [f"{file_name}: {problem}"])

    try:
        content = folder.read(file_name, MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise refuse("expected a file of this name, there is none") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise refuse(f"expected at most {MAX_CONFIG_BYTES} bytes, the file is larger")
    try:
        values = json.loads(content, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise refuse(f"expected at most {_MAX_NESTING} levels of nesting, there are far more") from None
    except ValueError as error:
        raise refuse(f"expected JSON, got something else ({_no_json(content, error)})") from None
    if _nests_deeper(values, _MAX_NESTING):
        raise refuse(f"expected at most {_MAX_NESTING} levels of nesting, there are more")
    return values


def _no_json(content: bytes, error: ValueError) -> str:
    """Why `content` cannot be read, without an excerpt of it."""
    if (is_other := told_by_start(content)) is not None:
        return is_other
    if isinstance(error, json.JSONDecodeError):
        # What may follow is an excerpt of the file.
        return f"{error.msg.partition(':')[0]}: line {error.lineno}, column {error.colno}"
    return "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _nests_deeper(value: object, levels: int) -> bool:
    level: list[object] = [value]
    for _ in range(levels + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True

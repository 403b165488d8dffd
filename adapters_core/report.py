"""What an adapter is, for whoever loads or inspects it: modules, ranks, scales, sizes, base, warnings.

Made from what the files brought, with or without a model; problems are errors and are raised elsewhere. Does
not import mlx-lm. Pure functions; runs on any thread.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import mlx.core as mx
from pydantic import JsonValue

from .config import CONFIG_FILE
from .layers.module_weights import ModuleWeights

__all__ = ["Described", "LoadReport", "Part", "parts_of"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:")
# What conversions add to a model's name; the names without it are compared.
_CONVERTED = re.compile(
    r"(?:[-_.](?:mlx|hf|unsloth|bnb|awq|gptq|dwq|bf16|fp16|f16|fp32|bfloat16|float16|float32|mxfp[48]|nvfp4"
    r"|int[48]|q\d|\d+bits?))+$"
)


class Described(Protocol):
    """What knows an adapter's files: a container, or the files alone."""

    @property
    def format(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def base_name(self) -> str | None: ...
    @property
    def ignored_fields(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted module: `kind` is a `ModuleKind`, or None while no model has said so.

    `is_silent` if it changes nothing, because its scale or all of its B is zero.
    """

    rank: int
    scale: float
    dtypes: frozenset[str]
    is_silent: bool
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was read.

    `base_name` is the base that the config names, without the folders of another machine. `kinds` counts the
    modules of each kind (empty without a model), `names` those of each last name, such as q_proj; `layers`
    are the numbers of the layers that they lie in. `tensor_bytes` is what the tensors take in the file's
    precision. `ignored_fields` of the config matter in training only. `warnings` are sentences.
    """

    format: str
    type: str
    digest: str | None
    base_name: str | None
    modules: int
    kinds: dict[str, int]
    names: dict[str, int]
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dtypes: tuple[str, ...]
    tensor_bytes: int
    ignored_fields: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, content: Described, parts: Mapping[str, Part], warnings: Iterable[str] = ()) -> LoadReport:
        """The report on `content`, which adapts `parts`, by path; `warnings` are those of its mapping."""
        named = content.base_name
        return cls(
            format=content.format,
            type=str(content.type),
            digest=content.digest,
            base_name=_last(named) if named and _ABSOLUTE.match(named) else named,
            modules=len(parts),
            kinds=_counts(part.kind for part in parts.values() if part.kind is not None),
            names=_counts(path.rpartition(".")[2] for path in parts),
            layers=tuple(sorted({int(found[1]) for path in parts if (found := _NUMBER.search(path))})),
            ranks=tuple(sorted({part.rank for part in parts.values()})),
            scales=tuple(sorted({part.scale for part in parts.values()})),
            dtypes=tuple(sorted({dtype for part in parts.values() for dtype in part.dtypes})),
            tensor_bytes=content.size_bytes,
            ignored_fields=content.ignored_fields,
            warnings=(*warnings, *_silence(parts)),
        )

    def beside(self, names: Iterable[str]) -> LoadReport:
        """With a warning if the config names another base than the one that is called `names`.

        Folders, owners, case, and what conversions add ("-4bit") make no difference.
        """
        ours = [name for name in names if name]
        if self.base_name is None or not ours or _plain(self.base_name) in map(_plain, ours):
            return self
        warning = (
            f"{CONFIG_FILE} names the base {self.base_name!r}, and this one is {_last(ours[0])!r}. Modules "
            "and sizes fit; if these are not the same model, the adapter will not do what it was trained for."
        )
        return replace(self, warnings=(*self.warnings, warning))

    def to_values(self) -> dict[str, JsonValue]:
        """In JSON's types."""
        return {
            "format": self.format,
            "type": self.type,
            "digest": self.digest,
            "base_name": self.base_name,
            "modules": self.modules,
            "kinds": dict[str, JsonValue](self.kinds),
            "names": dict[str, JsonValue](self.names),
            "layers": list[JsonValue](self.layers),
            "ranks": list[JsonValue](self.ranks),
            "scales": list[JsonValue](self.scales),
            "dtypes": list[JsonValue](self.dtypes),
            "tensor_bytes": self.tensor_bytes,
            "ignored_fields": list[JsonValue](self.ignored_fields),
            "warnings": list[JsonValue](self.warnings),
        }


def parts_of(
    weights: Mapping[str, ModuleWeights], kinds: Mapping[str, str | None] | None = None
) -> dict[str, Part]:
    """What a report says of `weights`, by path; `kinds` is what a model says that these modules are."""
    kinds = kinds or {}
    if not weights:
        return {}
    # In one go: a load waits for this.
    heard = cast("list[Any]", mx.stack([mx.any(each.lora_b) for each in weights.values()]).tolist())
    return {
        path: Part(
            rank=module.file_rank,
            scale=module.scale,
            dtypes=frozenset(
                str(array.dtype).rpartition(".")[2]
                for array in (module.lora_a, module.lora_b, module.magnitude, module.bias)
                if array is not None
            ),
            # A magnitude or a bias changes something by itself.
            is_silent=module.magnitude is None
            and module.bias is None
            and (module.scale == 0 or not is_heard),
            kind=kinds.get(path),
        )
        for (path, module), is_heard in zip(weights.items(), heard, strict=True)
    }


def _silence(parts: Mapping[str, Part]) -> tuple[str, ...]:
    silent = [path for path, part in parts.items() if part.is_silent]
    if not silent:
        return ()
    if len(silent) == len(parts):
        return ("The adapter changes nothing: the scale or all of B is zero in every module.",)
    return (
        f"{len(silent)} of {len(parts)} modules change nothing, since the scale or all of B is zero there; "
        f"the first is {min(silent)}.",
    )


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _plain(name: str) -> str:
    return _CONVERTED.sub("", _last(name).lower())

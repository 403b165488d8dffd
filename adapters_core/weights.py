"""The tensors of an adapter: adapters.safetensors, read, checked and written.

Knows neither the config nor a model: which tensors have to be there is the container's affair. What is
read is evaluated on the calling thread, so that it can be handed to another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .errors import InvalidAdapterError
from .files import replacing

__all__ = ["MAX_HEADER_BYTES", "WEIGHTS_FILE", "AdapterWeights", "digest_of", "read_weights", "save_weights"]

WEIGHTS_FILE = "adapters.safetensors"
MAX_HEADER_BYTES = 1 << 20
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Evaluated tensors by name; `digest` ("sha256:…") covers names, dtypes, shapes and bytes."""

    tensors: dict[str, mx.array]
    digest: str
    size_bytes: int


def read_weights(directory: str | Path) -> AdapterWeights:
    """Read and evaluate `adapters.safetensors` in `directory`.

    Raises:
        InvalidAdapterError: the file is missing, not whole, not safetensors, has a header over 1 MiB, or
            holds tensors that are not float32, float16 or bfloat16, or values that are not finite.
    """
    directory = Path(directory)
    path = directory / WEIGHTS_FILE
    problem = _unreadable(path)
    problems = [problem] if problem else _wrong_dtypes(path)
    if not problems:
        tensors = _load(path)
        problems = _not_finite(tensors)
        if not problems:
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            return AdapterWeights(tensors, digest_of(tensors), size_bytes)
    raise InvalidAdapterError(directory.name, [f"{WEIGHTS_FILE}: {problem}" for problem in problems])


def save_weights(path: str | Path, tensors: Mapping[str, mx.array]) -> None:
    """Write `tensors` to `path` (a .safetensors file) in full or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(Path(path)) as temporary:
        try:
            mx.save_safetensors(str(temporary), dict(tensors))
        except RuntimeError as error:
            raise OSError(f"{Path(path).name} cannot be written to its folder") from error


def digest_of(tensors: Mapping[str, mx.array]) -> str:
    """The digest of names, dtypes, shapes and bytes, in the order of the names: "sha256:…"."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\n{tensor.dtype}\n{tensor.shape}\n".encode())
        flat: Any = mx.contiguous(tensor).reshape(-1).view(mx.uint8)
        total.update(memoryview(flat))
    return f"sha256:{total.hexdigest()}"


def _unreadable(path: Path) -> str | None:
    """Why the file cannot be parsed, as far as its first bytes and its size tell."""
    if not path.is_file():
        return "expected a file of this name, there is none"
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        return f"expected a safetensors file, got {len(prefix)} byte(s)"
    if header_bytes > MAX_HEADER_BYTES:
        return (
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {header_bytes}; "
            "the file is damaged or not safetensors"
        )
    return None


def _wrong_dtypes(path: Path) -> list[str]:
    """Problems of the header: the reference parser checks it and the file's length in full."""
    try:
        with safe_open(str(path), framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return [
            f"expected a whole safetensors file, got a damaged one ({error})".replace(str(path), path.name)
        ]
    if not dtypes:
        return ["expected tensors, the file holds none"]
    return [
        f"tensor {name}: expected dtype float32, float16 or bfloat16, got {dtype}"
        for name, dtype in sorted(dtypes.items())
        if dtype not in _FLOATS
    ]


def _load(path: Path) -> dict[str, mx.array]:
    try:
        tensors = cast("dict[str, mx.array]", mx.load(str(path)))
        mx.eval(tensors)
    except RuntimeError as error:
        problem = f"{WEIGHTS_FILE}: cannot be loaded ({error})".replace(str(path), path.name)
        raise InvalidAdapterError(path.parent.name, [problem]) from None
    return tensors


def _not_finite(tensors: dict[str, mx.array]) -> list[str]:
    wrong = {name: mx.sum(mx.logical_not(mx.isfinite(tensor))) for name, tensor in tensors.items()}
    mx.eval(wrong)
    return [
        f"tensor {name}: expected finite values, {count.item()} of {tensors[name].size} are NaN or infinite"
        for name, count in sorted(wrong.items())
        if count.item()
    ]

"""The tensors of an adapter: adapters.safetensors or adapter_model.safetensors, read, checked and written.

Knows neither the config nor a model: which tensors have to be there is the container's affair. A file is
read once: what is parsed, checked, hashed and handed on are the very same bytes. The arrays are evaluated on
the calling thread, so that they can be handed to another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import InvalidAdapterError, quoted
from ..files import replacing
from ..open_folder import OpenFolder, opened
from ..starts import START_BYTES, told_by_start

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_NAME_CHARS",
    "PEFT_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "AdapterWeights",
    "digest_of",
    "least_file_bytes",
    "read_weights",
    "save_weights",
]

WEIGHTS_FILE = "adapters.safetensors"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1 << 20
MAX_NAME_CHARS = 512
"""Of a tensor: messages quote names, so that these are bounded and drive no terminal."""
# Where each expert is a module of its own, the names alone take more: 40,000 tensors in 5 MB.
_MAX_PEFT_HEADER_BYTES = 1 << 24
# float64 is narrowed: MLX computes it on a CPU alone, and PEFT loads it into float32 as well.
_FLOATS = {"F64": mx.float32, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_EXPONENT_BF16 = 0x7F80  # all ones: infinite or not a number


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Evaluated tensors by name; `digest` ("sha256:…") covers names, dtypes, shapes and bytes.

    `notes` say how they differ from what is in the file, a sentence each.
    """

    tensors: dict[str, mx.array]
    digest: str
    size_bytes: int
    notes: tuple[str, ...] = ()


def read_weights(directory: str | Path | OpenFolder, file_name: str = WEIGHTS_FILE) -> AdapterWeights:
    """Read and evaluate the safetensors file of this name in `directory`, which may be open.

    Raises:
        InvalidAdapterError: the file is missing, not whole, not safetensors, has a header over 1 MiB (in
            PEFT's files 16 MiB), or holds tensors that are empty or no floats of 16 to 64 bits, or values
            that are not finite (in float32 for float64); because of an OSError, if it cannot be read.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`; or it was written meanwhile.
    """
    with opened(directory) as folder:
        found, problems = _read(folder, file_name, _max_header_bytes(file_name))
    problems = problems or _not_finite(found)
    if problems:
        raise InvalidAdapterError(folder.name, [f"{file_name}: {problem}" for problem in problems])
    digest = _digest((tensor.name, tensor.dtype, tensor.shape, tensor.values) for tensor in found)
    notes = _notes(file_name, found)
    tensors: dict[str, mx.array] = {}
    for tensor in _one_by_one(found):
        tensors[tensor.name] = tensor.to_array()
    mx.eval(tensors)
    return AdapterWeights(tensors, digest, sum(tensor.nbytes for tensor in tensors.values()), notes)


def least_file_bytes(folder: OpenFolder, file_name: str, copies_bytes: int = 0) -> int:
    """Bytes that the adapter in the file takes beside any base at the very least; reads its header at most.

    Factors take at least what they take in the file, DoRA's magnitudes at least half. In PEFT's file, up to
    `copies_bytes` may be weights of the base.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read, or is no safetensors file.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`.
    """
    file = folder.file(file_name)
    whole_bytes = os.fstat(file.fileno()).st_size - _max_header_bytes(file_name)
    if file_name != PEFT_WEIGHTS_FILE:
        return max(0, whole_bytes) // 2
    return max(0, _factor_bytes(file), whole_bytes - copies_bytes) // 2


def save_weights(path: str | Path, tensors: Mapping[str, mx.array]) -> None:
    """Write `tensors` to `path` (a .safetensors file) in full or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with replacing(Path(path)) as temporary:
            mx.save_safetensors(str(temporary), dict(tensors))
    except (RuntimeError, FileNotFoundError) as error:
        raise OSError(f"{Path(path).name} cannot be written to its folder") from error


def digest_of(tensors: Mapping[str, mx.array]) -> str:
    """The digest of names, dtypes, shapes and bytes, in the order of the names: "sha256:…"."""
    return _digest(
        (name, tensor.dtype, tensor.shape, cast(Any, mx.contiguous(tensor).reshape(-1).view(mx.uint8)))
        for name, tensor in sorted(tensors.items())
    )


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a file; `values` (n,) are its values, bfloat16 ones as uint16 with the same bits.

    `narrowing` is None unless they were float64; then, whether any is another one in float32.
    """

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    values: np.ndarray
    narrowing: bool | None = None

    def to_array(self) -> mx.array:
        array = mx.array(self.values.reshape(self.shape))
        return array.view(mx.bfloat16) if self.dtype == mx.bfloat16 else array

    def count_not_finite(self) -> int:
        if self.dtype == mx.bfloat16:
            return int(np.count_nonzero((self.values & _EXPONENT_BF16) == _EXPONENT_BF16))
        return self.values.size - int(np.count_nonzero(np.isfinite(self.values)))


def _digest(tensors: Iterable[tuple[str, mx.Dtype, tuple[int, ...], Any]]) -> str:
    """`tensors` in the order of their names."""
    total = hashlib.sha256()
    for name, dtype, shape, values in tensors:
        total.update(f"{name}\n{dtype}\n{shape}\n".encode())
        total.update(memoryview(values))
    return f"sha256:{total.hexdigest()}"


def _one_by_one(tensors: list[_Tensor]) -> Iterator[_Tensor]:
    """Each of `tensors` in turn, taken out of the list, so that its bytes go when it has been used."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def _max_header_bytes(file_name: str) -> int:
    return _MAX_PEFT_HEADER_BYTES if file_name == PEFT_WEIGHTS_FILE else MAX_HEADER_BYTES


def _factor_bytes(file: BinaryIO) -> int:
    """What the factors in PEFT's file take; it may hold weights of the base beside them. Raises as above."""
    header_bytes = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(header_bytes, _MAX_PEFT_HEADER_BYTES)))
    try:
        offsets = [entry["data_offsets"] for name, entry in header.items() if ".lora_" in name]
        return max(0, min(sum(end - start for start, end in offsets), os.fstat(file.fileno()).st_size))
    except (AttributeError, KeyError, TypeError):
        raise ValueError("not a safetensors header") from None


def _read(folder: OpenFolder, name: str, max_header_bytes: int) -> tuple[list[_Tensor], list[str]]:
    """The file's tensors, or why it cannot be parsed. The file's own bytes are let go of."""
    try:
        file = folder.file(name)
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) == 8 and header_bytes <= max_header_bytes:
            return _parse(folder.read(name))
        start = prefix + file.read(START_BYTES)
    except FileNotFoundError:
        return [], ["expected a file of this name, there is none"]
    except OSError as error:
        raise InvalidAdapterError(folder.name, [f"{name}: cannot be read: {error.strerror}"]) from error
    if len(prefix) < 8:
        return [], [f"expected a safetensors file, got {len(prefix)} byte(s)"]
    if (is_other := told_by_start(start)) is not None:
        return [], [f"expected a safetensors file, got another: {is_other}"]
    problem = (
        f"expected a safetensors header of at most {max_header_bytes} bytes, got {header_bytes}; "
        "the file is damaged or not safetensors"
    )
    return [], [problem]


def _parse(content: bytes) -> tuple[list[_Tensor], list[str]]:
    """The tensors by name, or problems: the reference parser checks the header and the length in full."""
    try:
        parsed = sorted(deserialize(content), key=itemgetter(0))
    except SafetensorError as error:
        # What may follow is an excerpt of the file.
        what = str(error).removeprefix("Error while deserializing: ").partition(":")[0].partition(" `")[0]
        return [], [f"expected a whole safetensors file, got a damaged one ({what})"]
    if not parsed:
        return [], ["expected tensors, the file holds none"]
    unusual = [name for name, _ in parsed if len(name) > MAX_NAME_CHARS or not name.isprintable()]
    if unusual:
        shown = ", ".join(quoted(name) for name in unusual[:3])
        expected = f"expected names of at most {MAX_NAME_CHARS} printable characters"
        return [], [f"{expected}, {len(unusual)} of {len(parsed)} tensors have others, such as {shown}"]
    if empty := [name for name, tensor in parsed if tensor["shape"] == [0]]:
        return [], [_EMPTY.format(count=len(empty), all=len(parsed), name=empty[0])]
    problems = [
        f"tensor {name}: expected dtype float32, float16, bfloat16 or float64, got {dtype}{_advice(dtype)}"
        for name, tensor in parsed
        if (dtype := tensor["dtype"]) not in _FLOATS
    ]
    return [] if problems else [_tensor(name, **tensor) for name, tensor in parsed], problems


_EMPTY = (
    "{count} of {all} tensors are empty, such as {name} of shape (0,): they were saved while DeepSpeed's "
    "ZeRO-3 (or FSDP) had them in parts on several devices. Save again with "
    '"stage3_gather_16bit_weights_on_model_save": true in DeepSpeed\'s config, or make the whole tensors '
    "from the checkpoint with its `python zero_to_fp32.py CHECKPOINT OUTPUT`"
)


def _advice(dtype: str) -> str:
    """What to do about a dtype that no factor has here."""
    if dtype.startswith("F8") or dtype in ("I8", "U8", "I4", "U4", "F4"):
        return ", whose scales are elsewhere; save the factors before they are quantised, in bfloat16"
    return ", which no factor is; leave it out, or save the factors in bfloat16"


def _tensor(name: str, dtype: str, shape: list[int], data: bytearray) -> _Tensor:
    values = np.frombuffer(data, dtype=_NUMPY[dtype])
    if dtype != "F64":
        return _Tensor(name, _FLOATS[dtype], tuple(shape), values)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return _Tensor(name, _FLOATS[dtype], tuple(shape), narrow, not np.array_equal(narrow, values))


def _notes(file_name: str, tensors: Iterable[_Tensor]) -> tuple[str, ...]:
    narrowed = [tensor.narrowing for tensor in tensors if tensor.narrowing is not None]
    if not narrowed:
        return ()
    how = "each value rounded once" if any(narrowed) else "which changes no value"
    return (f"{file_name} has {len(narrowed)} tensor(s) in float64; they are served in float32, {how}.",)


def _not_finite(tensors: list[_Tensor]) -> list[str]:
    counts = [(tensor, tensor.count_not_finite()) for tensor in tensors]
    return [
        f"tensor {tensor.name}: expected finite values, {count} of {tensor.values.size} are NaN or infinite"
        f"{'' if tensor.narrowing is None else ' in float32'}"
        for tensor, count in counts
        if count
    ]

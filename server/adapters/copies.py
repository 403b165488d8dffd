"""What private copies hold, and how a version comes back from one. Knows no names. Runs on a worker thread.

`FilesCopy` is for what was read from a folder: its own files. `ModulesCopy` is for what was made in memory.
Both give the adapter as it was. `RowsCopy` is for what can only be had from the bank, when its folder holds
something else already: it brings back what is served, bit for bit, and not the adapter that it came from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from adapters_core.bank import AdapterBank, PreparedAdapter
from adapters_core.container import AdapterContainer
from adapters_core.formats.weights import digest_of
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.open_folder import OpenFolder

from .errors import AdapterNotReadableError
from .folder import AdapterFolder

__all__ = ["Copy", "FilesCopy", "ModulesCopy", "RowsCopy", "files_bytes"]

_HEADER_BYTES = 64
_ENTRY_BYTES = 160
"""Of a tensor in a header, beside its name: dtype, up to four sizes, and where it begins and ends."""


class Copy(Protocol):
    """A copy on disk of `size_bytes`."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        ...

    def container(self, name: str) -> AdapterContainer:
        """The adapter, called `name` in errors.

        Raises:
            AdapterNotReadableError: the copy does not hold it.
            FileNotFoundError, ValueError, InvalidAdapterError: it has gone, or is not what was written.
            Other OSErrors, RuntimeError, InvalidAdapterError because of an OSError: it cannot be read now.
        """
        ...

    def prepare(self, bank: AdapterBank) -> PreparedAdapter:
        """What `bank` needs of it; whoever asks compares digests. Raises as `container`."""
        ...

    def remove(self) -> None:
        """Have it no more; it may have gone already."""
        ...


@dataclass(frozen=True, slots=True)
class FilesCopy:
    """The files of an adapter's folder, in one of its own with the same name, inside another."""

    folder: AdapterFolder
    size_bytes: int

    @classmethod
    def of(cls, folder: AdapterFolder, place: Path) -> FilesCopy:
        """Copy what is in `folder` now to `place`, which is made.

        Raises:
            OSError: it cannot be read, or written, and nothing is left.
            AdapterError, LifeCycleError: as `AdapterFolder.open`; or it changed meanwhile.
        """
        target, size_bytes = place / folder.path.name, 0
        try:
            place.mkdir()  # in a folder that is there
            target.mkdir()
            with folder.open() as files:
                for name in _files_of(folder, files):
                    with (target / name).open("xb") as copy:
                        size_bytes += files.copy(name, copy)
                files.refuse_changed()
            return cls(replace(folder, path=target, root=None), size_bytes)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def container(self, name: str) -> AdapterContainer:
        """As it was read, under the name of its folder."""
        return AdapterContainer.from_directory(self.folder.path, self.folder.weights_file, self.folder.scale)

    def prepare(self, bank: AdapterBank) -> PreparedAdapter:
        """Checked and laid out as when it was first read."""
        return bank.prepare(self.container(self.folder.shown))

    def remove(self) -> None:
        """Its folder, with the one around it."""
        shutil.rmtree(self.folder.path.parent, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _File:
    """A safetensors file as it was written: its size, and the bytes with which it begins."""

    path: Path
    size_bytes: int
    header: bytes

    @classmethod
    def of(cls, path: Path, arrays: Mapping[str, mx.array]) -> _File:
        """Write `arrays`. Raises OSError, or RuntimeError, which is MLX's own; then nothing is left."""
        try:
            mx.save_safetensors(str(path), dict(arrays))
            with path.open("rb") as file:
                prefix = file.read(8)
                header = prefix + file.read(int.from_bytes(prefix, "little"))
            return cls(path, path.stat().st_size, header)
        except BaseException:
            _unlink(path)
            raise

    def read(self) -> dict[str, mx.array]:
        """What was written, evaluated.

        Raises:
            FileNotFoundError, ValueError: it has gone, or is not what was written.
            OSError, RuntimeError: it cannot be read now.
        """
        with self.path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != self.size_bytes or file.read(len(self.header)) != self.header:
                raise ValueError("expected the file that was written")
        loaded = mx.load(str(self.path))
        if not isinstance(loaded, dict):
            raise ValueError("expected tensors by name")
        mx.eval(loaded)
        return loaded


@dataclass(frozen=True, slots=True)
class _Rest:
    """What a module's weights are besides arrays, and of how many parts they are made."""

    weights: ModuleWeights
    parts: int

    def with_arrays(self, arrays: Sequence[mx.array | None]) -> ModuleWeights:
        """The whole, from arrays in the order of `ModuleWeights.arrays`."""
        *factors, magnitude, bias = arrays
        pairs = [(a, b) for a, b in pairwise(factors) if a is not None and b is not None][::2]
        if self.parts:
            whole = ModuleWeights.of_parts(pairs, self.weights.scale, bias)
            lora_a, lora_b, parts = whole.lora_a, whole.lora_b, whole.parts
        else:
            ((lora_a, lora_b),) = pairs
            parts = ()
        return replace(
            self.weights, lora_a=lora_a, lora_b=lora_b, magnitude=magnitude, bias=bias, parts=parts
        )


@dataclass(frozen=True, slots=True)
class ModulesCopy:
    """A file with the arrays of modules, each by its path and place; `rest` is all else of them, by path."""

    file: _File
    rest: Mapping[str, _Rest]

    @classmethod
    def of(cls, weights: Mapping[str, ModuleWeights], place: Path) -> ModulesCopy:
        """Write `weights`. Raises OSError, or RuntimeError, which is MLX's own; then nothing is left."""
        file = _File.of(place.with_suffix(".safetensors"), _named_arrays(weights))
        mx.eval(empty := mx.zeros(0))
        nothing = {"lora_a": empty, "lora_b": empty, "magnitude": None, "bias": None}
        rest = {
            name: _Rest(replace(one, parts=(), **nothing), len(one.parts)) for name, one in weights.items()
        }
        return cls(file, rest)

    @staticmethod
    def most_bytes(weights: Mapping[str, ModuleWeights]) -> int:
        """What a copy of `weights` takes at most."""
        return _most_bytes(_named_arrays(weights))

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.size_bytes

    def container(self, name: str) -> AdapterContainer:
        """Of the same tensors and scales, so that the digest is the same."""
        arrays = self.file.read()
        weights = {
            path: one.with_arrays([arrays.get(f"{path}:{at}") for at in range(2 * max(1, one.parts) + 2)])
            for path, one in self.rest.items()
        }
        return AdapterContainer.from_weights(weights, name)

    def prepare(self, bank: AdapterBank) -> PreparedAdapter:
        """Checked and laid out as when it was made."""
        return bank.prepare(self.container("a made adapter"))

    def remove(self) -> None:
        """The file."""
        _unlink(self.file.path)


@dataclass(frozen=True, slots=True)
class RowsCopy:
    """A file with the rows that lay in the bank; `rest` is what else the bank needs of them.

    `digest` is that of the rows, so that what comes back is what went.
    """

    file: _File
    rest: PreparedAdapter
    digest: str

    @classmethod
    def of(cls, prepared: PreparedAdapter, place: Path) -> RowsCopy:
        """Write the rows. Raises OSError, or RuntimeError, which is MLX's own; then nothing is left."""
        file = _File.of(place.with_suffix(".safetensors"), prepared.rows)
        return cls(file, replace(prepared, rows={}), digest_of(prepared.rows))

    @staticmethod
    def most_bytes(prepared: PreparedAdapter) -> int:
        """What a copy of the rows of `prepared` takes at most."""
        return _most_bytes(prepared.rows)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.size_bytes

    def container(self, name: str) -> AdapterContainer:
        """Scales and magnitudes are multiplied in, so that the adapter is not in the rows any more."""
        raise AdapterNotReadableError

    def prepare(self, bank: AdapterBank) -> PreparedAdapter:
        """The very rows."""
        rows = self.file.read()
        if digest_of(rows) != self.digest:
            raise ValueError("expected the rows that were written")
        return replace(self.rest, rows=rows)

    def remove(self) -> None:
        """The file."""
        _unlink(self.file.path)


def files_bytes(folder: AdapterFolder) -> int:
    """Bytes of the files that make up the adapter in `folder`.

    Raises:
        OSError, AdapterError, LifeCycleError: as `AdapterFolder.open`; or they cannot be opened.
    """
    with folder.open() as files:
        return sum(os.fstat(files.file(name).fileno()).st_size for name in _files_of(folder, files))


def _files_of(folder: AdapterFolder, files: OpenFolder) -> list[str]:
    return [name for name in files.names() if name in folder.file_names]


def _named_arrays(weights: Mapping[str, ModuleWeights]) -> dict[str, mx.array]:
    return {
        f"{name}:{at}": array
        for name, one in weights.items()
        for at, array in enumerate(one.arrays)
        if array is not None
    }


def _most_bytes(arrays: Mapping[str, mx.array]) -> int:
    """What a safetensors file of `arrays` takes at most: their bytes, and a header with an entry for each."""
    return _HEADER_BYTES + sum(array.nbytes + len(name) + _ENTRY_BYTES for name, array in arrays.items())


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()

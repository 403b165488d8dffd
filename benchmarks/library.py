"""Folders of random adapters for the sides, each written once and then linked to wherever it is needed.

Blocking; runs on a thread of its own while nothing is measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_core.formats.weights import WEIGHTS_FILE
from benchmarks.adapters import KINDS, KindName, write_adapters

__all__ = ["AdapterLibrary", "AdapterSet", "adapter_id", "tensor_bytes"]


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The first `count` adapters of a kind."""

    kind: KindName
    count: int

    @property
    def ids(self) -> tuple[str, ...]:
        """Their names, which are their folders' too."""
        return tuple(adapter_id(self.kind, index) for index in range(self.count))


def adapter_id(kind: KindName, index: int) -> str:
    """The name of one adapter, from 0."""
    return f"{kind}-{index}"


def tensor_bytes(folder: Path) -> int:
    """What the tensors in an adapter's file take, its header left out."""
    file = folder / WEIGHTS_FILE
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header_bytes


@dataclass(frozen=True, slots=True)
class AdapterLibrary:
    """All adapters of a run, under `folder`, the same for a `seed`."""

    model_path: Path
    folder: Path
    seed: int

    def root(self, sets: Sequence[AdapterSet]) -> Path:
        """A folder that holds the adapters of `sets` and no others; linked, so it takes no space of its own.

        Raises: ValueError if the model has no such modules; AdapterError, OSError.
        """
        name = "+".join(f"{each.kind}x{each.count}" for each in sets) or "none"
        root = self.folder / "roots" / name
        if root.is_dir():
            return root
        root.mkdir(parents=True)
        for each in sets:
            self._write(each)
            for adapter in each.ids:
                _link(self.folder / "all" / adapter, root / adapter)
        return root

    def _write(self, wanted: AdapterSet) -> None:
        everything = self.folder / "all"
        missing = [index for index, name in enumerate(wanted.ids) if not (everything / name).is_dir()]
        if missing:
            folders = {index: everything / adapter_id(wanted.kind, index) for index in missing}
            write_adapters(self.model_path, folders, KINDS[wanted.kind], self.seed)


def _link(source: Path, target: Path) -> None:
    """Not a symbolic link: a server resolves those, and then refuses what lies outside its root."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)

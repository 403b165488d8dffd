"""Folders of random adapters for the sides, each written once and then linked to wherever it is needed.

Blocking; runs on a thread of its own while nothing is measured.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_core.formats.weights import WEIGHTS_FILE
from benchmarks.adapters import AdapterKind, write_adapters

__all__ = ["AdapterLibrary", "AdapterSet", "adapter_id", "tensor_bytes"]


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The first `count` adapters of a kind."""

    kind: AdapterKind
    count: int

    @property
    def ids(self) -> tuple[str, ...]:
        """Their names, which are their folders' too."""
        return tuple(adapter_id(self.kind, index) for index in range(self.count))


def adapter_id(kind: AdapterKind, index: int) -> str:
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
        root = self.folder / "roots" / hashlib.sha256(name.encode()).hexdigest()[:16]
        if root.is_dir():
            return root
        everything = self.folder / "all"
        missing: dict[AdapterKind, dict[int, Path]] = {}
        for each in sets:
            for index, adapter in enumerate(each.ids):
                if not (everything / adapter).is_dir():
                    missing.setdefault(each.kind, {})[index] = everything / adapter
        if missing:
            write_adapters(self.model_path, missing, self.seed)
        root.mkdir(parents=True)
        for adapter in (adapter for each in sets for adapter in each.ids):
            _link(everything / adapter, root / adapter)
        return root


def _link(source: Path, target: Path) -> None:
    """Not a symbolic link: a server resolves those, and then refuses what lies outside its root."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)

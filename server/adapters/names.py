"""What a name in a request may say: an adapter's id, one of its versions, one of its training's checkpoints.

    pirate             what the id means now
    pirate@2           its second version, while that lives
    pirate@step-100    the checkpoint that its training wrote at step 100

Versions and steps are both small whole numbers, so a step says that it is one: otherwise `pirate@100` would
mean another thing on the day when version 100 is loaded. A checkpoint is an adapter of its own, registered
under its whole name, and has versions too (`pirate@step-100@2`). Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .folder import is_valid_id

__all__ = ["Checkpoint", "Name", "checkpoint_of", "parse_name"]

_VERSION = re.compile(r"(?P<entry>.+)@(?P<number>[1-9][0-9]{0,8})")
_CHECKPOINT = re.compile(r"(?P<id>[^@]+)@step-(?P<step>0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class Name:
    """`entry` is the key in the registry, `version` the one that is asked for (None: the current one)."""

    entry: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Step `step` of the training that writes into the folder of adapter `id`."""

    id: str
    step: int

    def __str__(self) -> str:
        return f"{self.id}@step-{self.step}"


def parse_name(text: str, base: str) -> Name | None:
    """What `text` names beside the base model `base`; None if nothing can ever have this name."""
    versioned = _VERSION.fullmatch(text)
    name = Name(text) if versioned is None else Name(versioned["entry"], int(versioned["number"]))
    checkpoint = checkpoint_of(name.entry)
    return name if is_valid_id(name.entry if checkpoint is None else checkpoint.id, base) else None


def checkpoint_of(entry: str) -> Checkpoint | None:
    """The checkpoint that a key of the registry stands for, if it stands for one."""
    found = _CHECKPOINT.fullmatch(entry)
    return None if found is None else Checkpoint(found["id"], int(found["step"]))

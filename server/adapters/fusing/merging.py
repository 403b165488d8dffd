"""What fusing computes before anything is exchanged: the merged layers, and how well they do.

All of it reads a copy of the module tree that shares the base's arrays, so that it can run on a thread beside
the generation, which goes on meanwhile: one small forward at a time competes with it for the processor, and
none waits in its queue. Knows no names. Runs on a worker thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from adapters_core.container import AdapterContainer
from adapters_core.fusing.activations import ActivationReport, compare_activations
from adapters_core.fusing.fusion import FuseReport, Precision, fuse_layers
from adapters_core.fusing.sums import summed_layers

from .progress import FuseProgress, Tell

__all__ = ["Merged", "merge"]


@dataclass(frozen=True, slots=True)
class Merged:
    """Layers for the base, by path, evaluated; what became of the weights, and of the outputs."""

    modules: Mapping[str, nn.Module]
    report: FuseReport
    activations: ActivationReport


def merge(
    model: Any,
    terms: Sequence[tuple[AdapterContainer, float]],
    precision: Precision,
    threshold: float,
    rows: Sequence[Sequence[int]],
    source: str,
    tell: Tell,
) -> Merged:
    """The layers of `model`, a tree of modules of its own, with the weighted sum of adapters merged in.

    `rows` are the prompts on which the outputs are compared.

    Raises: InvalidAdapterError, UnsupportedModelError, BlendError.
    """
    layers = summed_layers(model, terms)
    modules, report = fuse_layers(
        layers,
        precision,
        source,
        threshold=threshold,
        progress=lambda done, total: tell(FuseProgress("merging", done, total)),
    )
    activations = compare_activations(
        model,
        layers,
        modules,
        rows,
        progress=lambda done, total: tell(FuseProgress("comparing", done, total)),
        source=source,
    )
    return Merged(modules, report, activations)

"""LoRA and DoRA adapters for MLX models: read, checked, loaded, fused, served side by side, saved.

Knows no HTTP and no threads, and keeps no state. The names are imported on first use, so that importing
the package, its errors or its config does not import MLX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bank import AdapterBank, PreparedAdapter
    from .blending.blend import Blend, BlendOptions, BlendPart, BlendReport, blend
    from .config import AdapterConfig, FineTuneType, LoRAParameters
    from .container import AdapterContainer
    from .errors import (
        AdapterError,
        BlendError,
        ContainerStateError,
        InvalidAdapterError,
        InvalidBlendError,
        UnsupportedModelError,
    )
    from .formats.writing import write_adapter
    from .fusing.fusion import FuseReport, Fusion, Precision
    from .layers.kinds import (
        DoRAEmbedding,
        DoRALinear,
        FeatureDoRAEmbedding,
        LoRAEmbedding,
        LoRALayer,
        LoRALinear,
        LoRASplitLinear,
        LoRASwitchLinear,
        QDoRALinear,
        QLoRALinear,
    )
    from .layers.module_weights import ModuleWeights
    from .layers.modules import ModuleKind, factor_shapes, kind_of
    from .layers.targets import adaptable_layers, default_keys, resolve_targets
    from .mixed.residents import ResidentAdapter, RowAdapters, make_row, row_key
    from .mixed.routing import AdapterRows, RoutedModel, Routing
    from .report import LoadReport

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "AdapterContainer",
    "AdapterError",
    "AdapterRows",
    "Blend",
    "BlendError",
    "BlendOptions",
    "BlendPart",
    "BlendReport",
    "ContainerStateError",
    "DoRAEmbedding",
    "DoRALinear",
    "FeatureDoRAEmbedding",
    "FineTuneType",
    "FuseReport",
    "Fusion",
    "InvalidAdapterError",
    "InvalidBlendError",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameters",
    "LoRASplitLinear",
    "LoRASwitchLinear",
    "LoadReport",
    "ModuleKind",
    "ModuleWeights",
    "Precision",
    "PreparedAdapter",
    "QDoRALinear",
    "QLoRALinear",
    "ResidentAdapter",
    "RoutedModel",
    "Routing",
    "RowAdapters",
    "UnsupportedModelError",
    "adaptable_layers",
    "blend",
    "default_keys",
    "factor_shapes",
    "kind_of",
    "make_row",
    "resolve_targets",
    "row_key",
    "write_adapter",
]

_MODULES = {
    "bank": ("AdapterBank", "PreparedAdapter"),
    "blending.blend": ("Blend", "BlendOptions", "BlendPart", "BlendReport", "blend"),
    "config": ("AdapterConfig", "FineTuneType", "LoRAParameters"),
    "container": ("AdapterContainer",),
    "errors": (
        "AdapterError",
        "BlendError",
        "ContainerStateError",
        "InvalidAdapterError",
        "InvalidBlendError",
        "UnsupportedModelError",
    ),
    "fusing.fusion": ("FuseReport", "Fusion", "Precision"),
    "layers.kinds": (
        "DoRAEmbedding",
        "DoRALinear",
        "FeatureDoRAEmbedding",
        "LoRAEmbedding",
        "LoRALayer",
        "LoRALinear",
        "LoRASplitLinear",
        "LoRASwitchLinear",
        "QDoRALinear",
        "QLoRALinear",
    ),
    "layers.module_weights": ("ModuleWeights",),
    "layers.modules": ("ModuleKind", "factor_shapes", "kind_of"),
    "mixed.residents": ("ResidentAdapter", "RowAdapters", "make_row", "row_key"),
    "mixed.routing": ("AdapterRows", "RoutedModel", "Routing"),
    "report": ("LoadReport",),
    "layers.targets": ("adaptable_layers", "default_keys", "resolve_targets"),
    "formats.writing": ("write_adapter",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

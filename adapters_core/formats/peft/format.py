"""Adapters in PEFT's format: adapter_config.json with peft_type, and adapter_model.safetensors.

Factors come transposed to mlx-lm's orientation because the format says so, whatever their shapes: PEFT's
`lora_A.weight` is (r, in), `lora_B.weight` (out, r), `lora_embedding_A` (r, num_embeddings),
`lora_embedding_B` (dims, r). Runs on any thread; changes no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ...config import FineTuneType
from ...layers.module_weights import ModuleWeights
from ..protocol import FormatName, Mapped, ModulesFormat
from .config import PeftConfig
from .mapping import map_onto

__all__ = ["PeftFormat"]


@dataclass(frozen=True, slots=True)
class PeftFormat:
    """A PEFT adapter as its files say it is."""

    config: PeftConfig
    tensors: Mapping[str, mx.array]
    name: FormatName = "peft"

    @property
    def type(self) -> FineTuneType:
        """LoRA or DoRA."""
        return self.config.type

    @property
    def dropout(self) -> float:
        """`lora_dropout`."""
        return self.config.fields.lora_dropout

    @property
    def base_name(self) -> str | None:
        """`base_model_name_or_path`."""
        return self.config.fields.base_model_name_or_path or None

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields with a value that matter in training only."""
        return self.config.ignored

    @property
    def meaning(self) -> JsonValue:
        """The fields that decide what the adapter computes."""
        silent = {"base_model_name_or_path", "peft_version", "lora_dropout"}
        return ["peft", self.config.fields.model_dump(mode="json", exclude=silent)]

    def on(self, model: nn.Module) -> Mapped:
        """Find the place of every tensor in `model`, and a tensor for every module that the config names."""
        return map_onto(model, self.config, self.tensors)

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> ModulesFormat:
        """Modules by path: PEFT's config may not describe other values than the file's."""
        return ModulesFormat(weights, base_name=self.base_name, dropout=self.dropout)

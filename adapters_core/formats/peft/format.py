"""Adapters in PEFT's format: adapter_config.json with peft_type, and adapter_model.safetensors.

Factors come transposed to mlx-lm's orientation because the format says so, whatever their shapes: PEFT's
`lora_A.weight` is (r, in), `lora_B.weight` (out, r), `lora_embedding_A` (r, num_embeddings),
`lora_embedding_B` (dims, r). Runs on any thread; changes no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ...config import FineTuneType
from ...layers.module_weights import ModuleWeights
from ..causes import causes_of_names
from ..misfits import Placed, causes_on
from ..protocol import FormatName, Mapped, ModulesFormat
from .config import PeftConfig
from .factors import sort_tensors
from .mapping import map_onto
from .module_factors import factor_sizes
from .places import Places

__all__ = ["PeftFormat"]


@dataclass(frozen=True, slots=True)
class PeftFormat:
    """A PEFT adapter as its files say it is; `notes` are on how its tensors were read."""

    config: PeftConfig
    tensors: Mapping[str, mx.array]
    name: FormatName = "peft"
    notes: tuple[str, ...] = ()

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
        mapped = map_onto(model, self.config, self.tensors)
        if mapped.problems:
            return replace(mapped, causes=self._causes(model))
        return replace(mapped, warnings=(*self.config.notes, *mapped.warnings, *self.notes))

    def _causes(self, model: nn.Module) -> tuple[str, ...]:
        """What may be behind problems on `model`."""
        if causes := causes_of_names(self.tensors.keys(), is_peft=True):
            return causes
        contents = list(sort_tensors(self.tensors).factors.values())
        places = Places(model, {one.path: factor_sizes(one)[1] for one in contents})
        found = []
        for one in contents:
            place = next((arrival.module for arrival in places.of(one.path)), None)
            found.append(Placed(one.path, place, *factor_sizes(one)))
        fields = self.config.fields
        rank = None if fields.rank_pattern or fields.trainable_token_indices else fields.r
        return causes_on(places.modules, found, rank=rank, base_name=self.base_name)

    def with_weights(self, weights: Mapping[str, ModuleWeights]) -> ModulesFormat:
        """Modules by path: PEFT's config may not describe other values than the file's."""
        return ModulesFormat(weights, base_name=self.base_name, dropout=self.dropout)

"""PEFT's adapter_config.json: read and checked, with every problem listed.

A field either decides what the adapter computes (it is parsed here), matters in training alone (it is kept
by name, for the load report), or is refused by name with the reason: nothing is passed over in silence.
The meaning of each field is that of PEFT 0.21 (`peft.tuners.lora.config`). Knows no tensors and no model.
Runs on any thread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from ...config import CONFIG_FILE, MAX_RANK, FineTuneType, shown
from ...errors import InvalidAdapterError, named
from .names import unwrapped, unwrapped_pattern
from .patterns import KeyPatterns, LookAroundError, Pattern, PatternError, compiled

__all__ = ["MAX_ALPHA", "PeftConfig", "PeftFields"]

# What PEFT puts the keys of rank_pattern and alpha_pattern, and those of layers_pattern, into.
_NAME_FRAME = r"(.*\.)?({})$"
_LAYER_FRAME = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
MAX_ALPHA = 1e6
_MAX_NAMES = 100_000
_MAX_INDEX = 100_000
_MAX_LAYER_NAMES = 64
_MAX_SAVED_NAMES = 1024

_Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=512)]
_Pattern = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=4096)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)]
_Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False, strict=True)]
_Index = Annotated[int, Field(ge=0, le=_MAX_INDEX, strict=True)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
_SavedName = Annotated[str, StringConstraints(strict=True, pattern=r"^[\w.-]+$", max_length=512)]
_SavedNames = Annotated[list[_SavedName], Field(max_length=_MAX_SAVED_NAMES)]
_Names = Annotated[list[_Name], Field(max_length=_MAX_NAMES)]

# What each field has to be, for the messages.
_EXPECTED = {
    "peft_type": '"LORA"',
    "r": f"a whole number from 1 to {MAX_RANK}",
    "lora_alpha": f"a finite number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}",
    "target_modules": "null, a list of module names, or one regular expression",
    "exclude_modules": "null, a list of module names, or one regular expression",
    "modules_to_save": f"null, or a list of at most {_MAX_SAVED_NAMES} module names",
    "target_parameters": "null, or a list of parameter names",
    "layers_to_transform": "null, a layer's index, or a list of them",
    "layers_pattern": f"null, a name, or a list of at most {_MAX_LAYER_NAMES} names",
    "rank_pattern": f"an object of module names or regular expressions with ranks from 1 to {MAX_RANK}",
    "alpha_pattern": "an object of module names or regular expressions with finite numbers",
    "trainable_token_indices": "null, a list of tokens, or an object of module names with such lists",
    "bias": '"none", "all" or "lora_only"',
    "lora_dropout": "a number from 0 to below 1",
    "base_model_name_or_path": "null or a string",
    "peft_version": "null or a string",
}

# Fields that change nothing once an adapter is trained; those with a value are named in the load report.
_TRAINING_ONLY = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # how the base lies in memory; A and B are the same either way
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "monteclora_config",  # samples in training only
        "peft_version",
        "qalora_group_size",  # read with use_qalora alone
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",  # another backward pass, the same forward
    }
)
# Values that say nothing, so that naming the field in a report would be noise.
_PLAIN: dict[str, tuple[JsonValue, ...]] = {
    "lora_dropout": (0, 0.0),
    "inference_mode": (True,),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True,),
}
_NEVER_REPORTED = frozenset({"peft_version"})

_MERGE = "Merge the adapter into its base with PEFT and serve that"
# Why a field with a value is refused, and what to do.
_REFUSED = {
    "alora_invocation_tokens": (
        "the adapter is active only after these tokens of a prompt (aLoRA), and one that is served is active "
        "for all of them. Train without it"
    ),
    "arrow_config": "several adapters are chosen between for every token (Arrow). Serve one, or a blend",
    "kasa_config": f"it goes with a base whose weights were truncated (KaSA). {_MERGE}",
    "layer_replication": f"it goes with a base whose layers were repeated. {_MERGE}",
    "megatron_config": "its layers are split as Megatron does. Save it again without Megatron",
    "use_bdlora": f"its factors are block-diagonal (BD-LoRA). {_MERGE}",
    "use_qalora": f"its inputs are averaged in groups (QALoRA). {_MERGE}, or train without it",
}
# Initialisations that subtract the first A and B from the base, or quantise it (PEFT's `update_layer`).
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")

_EXPRESSIONS = (
    ("target_modules", "target_pattern"),
    ("exclude_modules", "excluded_pattern"),
    ("layers_pattern", "layer_patterns"),
)
# Fields with names of modules, or with expressions for them.
_NAMING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)

_KINDS_ADVICE = "only LoRA adapters (DoRA among them) can be served"


class PeftFields(BaseModel):
    """The fields that decide what the adapter computes, as the file has them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    use_rslora: bool = Field(default=False, strict=True)
    use_dora: bool = Field(default=False, strict=True)
    lora_bias: bool = Field(default=False, strict=True)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False, strict=True)
    target_modules: _Names | _Pattern | None = None
    exclude_modules: _Names | _Pattern | None = None
    modules_to_save: _SavedNames | None = None
    target_parameters: _Names | None = None
    layers_to_transform: Annotated[list[_Index], Field(max_length=_MAX_NAMES)] | _Index | None = None
    layers_pattern: Annotated[list[_Name], Field(max_length=_MAX_LAYER_NAMES)] | _Pattern | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    trainable_token_indices: _Tokens | dict[_Name, _Tokens] | None = None
    ensure_weight_tying: bool | None = Field(default=None, strict=True)
    base_model_name_or_path: Annotated[str, StringConstraints(strict=True)] | None = None
    peft_version: Annotated[str, StringConstraints(strict=True, max_length=128)] | None = None

    def with_values(self, **values: Any) -> Self:
        """With others of some fields."""
        return type(self).model_validate(self.model_dump() | values)

    @cached_property
    def target_names(self) -> frozenset[str]:
        """`target_modules`, if it is a list."""
        return _as_set(self.target_modules)

    @cached_property
    def excluded_names(self) -> frozenset[str]:
        """`exclude_modules`, if it is a list."""
        return _as_set(self.exclude_modules)

    @cached_property
    def target_pattern(self) -> Pattern | None:
        """`target_modules`, if it is a regular expression. Raises PatternError if it cannot be used."""
        return compiled(self.target_modules) if isinstance(self.target_modules, str) else None

    @cached_property
    def excluded_pattern(self) -> Pattern | None:
        """`exclude_modules`, likewise."""
        excluded = self.exclude_modules
        return compiled(excluded) if excluded and isinstance(excluded, str) else None

    @cached_property
    def layer_patterns(self) -> tuple[Pattern, ...]:
        """`layers_pattern`, each with the group "idx" for the layer. Raises PatternError likewise."""
        names = self.layers_pattern or []
        names = [names] if isinstance(names, str) else names
        return tuple(compiled(name, _LAYER_FRAME, captures=True) for name in names)

    @cached_property
    def ranks(self) -> KeyPatterns:
        """`rank_pattern`: there may be a key for every module, and every module asks them all."""
        return KeyPatterns.of(self.rank_pattern or {}, _NAME_FRAME)

    @cached_property
    def alphas(self) -> KeyPatterns:
        """`alpha_pattern`."""
        return KeyPatterns.of(self.alpha_pattern or {}, _NAME_FRAME)

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """`target_parameters`."""
        return _as_set(self.target_parameters)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What PEFT's adapter_config.json says: its fields, and the names of those that were ignored.

    `unmatched` are fields with expressions that only a file's tensors can stand in for
    (`targets.named_by_tensors`); `fields` lacks them. `notes` are for the load report.
    """

    fields: PeftFields
    values: dict[str, JsonValue]
    ignored: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_values(cls, values: Mapping[str, JsonValue], source: str) -> Self:
        """Check `values`, as JSON gives them.

        Raises:
            InvalidAdapterError: naming `source` and every problem.
        """
        kind = values.get("peft_type")
        if kind != "LORA":
            raise InvalidAdapterError(
                source, [f"{CONFIG_FILE}: peft_type: {_KINDS_ADVICE}, got {shown(kind)}. {_MERGE}"]
            )
        problems = _refused(values)
        fields, unmatched = None, ()
        try:
            fields = PeftFields.model_validate(_unwrapped(values))
        except ValidationError as error:
            problems += _wrong(error, values)
        if fields is not None:
            unmatched = _with_look_around(fields)
            problems += [f"{CONFIG_FILE}: {problem}" for problem in _contradictions(fields, unmatched)]
        if fields is None or problems:
            raise InvalidAdapterError(source, problems)
        if unmatched:
            fields = fields.with_values(target_modules=None, exclude_modules=None)
        return cls(fields, dict(values), _ignored(values), unmatched)

    @property
    def type(self) -> FineTuneType:
        """LoRA or DoRA."""
        return FineTuneType.DORA if self.fields.use_dora else FineTuneType.LORA

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of B A: alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if self.fields.use_rslora else alpha / rank


def _as_set(names: list[str] | str | None) -> frozenset[str]:
    return frozenset(names if isinstance(names, list) else ())


def _refused(values: Mapping[str, JsonValue]) -> list[str]:
    problems = [
        f"{CONFIG_FILE}: {name}: {shown(values.get(name))} is not supported: {reason}"
        for name, reason in _REFUSED.items()
        if not _says_nothing(values.get(name))
    ]
    problems += _refused_initialisation(values.get("init_lora_weights"))
    known = {*PeftFields.model_fields, *_TRAINING_ONLY, *_REFUSED, "init_lora_weights"}
    problems += [
        f"{CONFIG_FILE}: {named(name)}: an unknown field with a value; it may change what the "
        "adapter computes. If it matters in training only, remove it"
        for name, value in sorted(values.items())
        if name not in known and not _says_nothing(value)
    ]
    return problems


def _refused_initialisation(value: JsonValue) -> list[str]:
    if value is None or isinstance(value, bool) or value in _PLAIN_INITIALISATIONS:
        return []
    if isinstance(value, str) and value.lower().startswith(_CHANGES_BASE):
        reason = (
            "changes the base before training, so that the adapter goes with another base. Save it again "
            "with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
        if value.lower() == "loftq":
            reason = f"goes with a base that was quantised in its own way. {_MERGE}"
        return [f"{CONFIG_FILE}: init_lora_weights: {shown(value)} is not supported: it {reason}"]
    known = ", ".join(_PLAIN_INITIALISATIONS)
    return [
        f"{CONFIG_FILE}: init_lora_weights: an unknown initialisation, {shown(value)}; it may change the "
        f"base. Those that are known not to: true, false, {known}"
    ]


def _unwrapped(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """`values` with names of modules as they are without what the model was wrapped in."""
    found = dict(values)
    for name in _NAMING:
        value = found.get(name)
        if isinstance(value, list):
            found[name] = [unwrapped(each) if isinstance(each, str) else each for each in value]
        elif isinstance(value, dict):
            rename = unwrapped_pattern if name.endswith("_pattern") else unwrapped
            renamed: dict[str, JsonValue] = {}
            for key, inner in value.items():
                renamed.setdefault(rename(key), inner)
            found[name] = renamed
        elif isinstance(value, str):
            found[name] = unwrapped_pattern(value)
    return found


def _with_look_around(fields: PeftFields) -> tuple[str, ...]:
    """The fields whose expression cannot be matched, but be replaced by what it matched in training."""
    found = []
    for name, compiled_name in _EXPRESSIONS[:2]:
        try:
            getattr(fields, compiled_name)
        except LookAroundError:
            found.append(name)
        except PatternError:
            return ()
    # With it, PEFT asks whether an expression matches a name that no tensor has.
    return () if fields.ensure_weight_tying else tuple(found)


def _contradictions(fields: PeftFields, unmatched: Collection[str]) -> list[str]:
    """What PEFT refuses too, regular expressions that cannot be used, and targets that are missing."""
    problems = []
    modules, parameters = fields.target_modules, fields.target_parameters
    if not modules and not parameters and not fields.trainable_token_indices:
        problems.append("target_modules: expected the names of the adapted modules, there are none")
    if isinstance(modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if not _says_nothing(value := getattr(fields, name)):
                problems.append(
                    f"{name}: {shown(value)} cannot be used with target_modules as a regular expression, in "
                    "PEFT either. Have the expression name the layers"
                )
    elif fields.layers_pattern and fields.layers_to_transform is None:
        problems.append(
            f"layers_pattern: {shown(fields.layers_pattern)} cannot be used without layers_to_transform, in "
            "PEFT either"
        )
    if fields.lora_bias and fields.use_dora:
        problems.append("lora_bias: true cannot be used with use_dora, in PEFT either")
    if parameters:
        for name in ("use_dora", "lora_bias"):
            if getattr(fields, name):
                problems.append(f"{name}: true cannot be used with target_parameters, in PEFT either")
    return problems + _unusable_patterns(fields, unmatched)


def _unusable_patterns(fields: PeftFields, unmatched: Collection[str]) -> list[str]:
    problems = [f"rank_pattern: {problem}" for problem in fields.ranks.problems]
    problems += [f"alpha_pattern: {problem}" for problem in fields.alphas.problems]
    for name, compiled_name in _EXPRESSIONS:
        if name in unmatched:
            continue
        try:
            getattr(fields, compiled_name)
        except PatternError as error:
            problems.append(f"{name}: {error}")
    return problems


def _ignored(values: Mapping[str, JsonValue]) -> tuple[str, ...]:
    names = (_TRAINING_ONLY | {"init_lora_weights"}) - _NEVER_REPORTED
    return tuple(
        sorted(
            name
            for name, value in values.items()
            if name in names and not _says_nothing(value) and value not in _PLAIN.get(name, ())
        )
    )


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _wrong(error: ValidationError, values: Mapping[str, JsonValue]) -> list[str]:
    """One problem for each field: a union of types would give one for each of its arms."""
    names = dict.fromkeys(str(details["loc"][0]) for details in error.errors(include_url=False))
    return [
        f"{CONFIG_FILE}: {name}: expected {_EXPECTED.get(name, 'true or false')}, "
        f"got {shown(values.get(name))}"
        for name in names
    ]

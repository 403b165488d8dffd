"""What becomes of adapters of every architecture of mlx-lm that can be built tiny, beside merged weights.

For each, a checkpoint of random weights as transformers has it (`architectures.json`) is
taken in twice: as it is, and with random factors for every linear layer and embedding merged into it. The
difference is what the mapped factors have to give. Where transformers does not have the architecture, names
are those of the MLX model. Command: `scripts/architectures`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten

from adapters_core.formats.peft.arrivals import Arrival
from adapters_core.formats.peft.config import PeftConfig
from adapters_core.formats.peft.mapping import map_onto
from adapters_core.formats.peft.places import Places
from adapters_core.formats.peft.sanitizing import checkpoint_of
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import ModuleKind, kind_of
from adapters_core.layers.targets import named_base_modules

__all__ = ["PAGE", "Outcome", "architectures", "outcome", "with_table"]

_DATA: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "architectures.json").read_text())
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
_TRANSFORMERS = "5.24.0"
_BEGIN, _END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
_RANK, _SCALE = 2, 2.0
_TOLERANCE = 1e-5
_KINDS: dict[ModuleKind | None, str] = {
    ModuleKind.LINEAR: "linear",
    ModuleKind.SPLIT: "linear",
    ModuleKind.EMBEDDING: "embedding",
}
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
Tensors = dict[str, mx.array]


@dataclass(slots=True)
class Outcome:
    """What becomes of an architecture's adapters: how many modules are exact, and the others by kind.

    `changes` says what loading does to weights that adapters touch. `wrong` is what must never be.
    """

    names: str = "mlx-lm"
    exact: int = 0
    changes: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    not_built: str | None = None


@dataclass(frozen=True, slots=True)
class _Module:
    """A module of the transformers model: its kind, its weight's name in the checkpoint and shape there."""

    kind: str
    weight: str
    shape: tuple[int, int]


def architectures() -> list[str]:
    """All of the installed mlx-lm, by the names of their files, and their variants."""
    found = []
    for one in pkgutil.iter_modules(mlx_lm.models.__path__):
        text = (Path(mlx_lm.models.__path__[0]) / f"{one.name}.py").read_text()
        if re.search(r"^class Model\(", text, re.M) or re.search(r"^Model = ", text, re.M):
            found.append(one.name)
    return sorted({*found, *(name for name in _DATA if name.partition(",")[0] in found)})


def outcome(name: str) -> Outcome:
    """Try the architecture."""
    result = Outcome()
    try:
        model = _built(name)
    except SystemExit:
        result.not_built = "its file needs a package that is not installed"
        return result
    except Exception as error:  # an architecture's code raises what it likes on a tiny config
        result.not_built = " ".join(str(error).split())[:100] or type(error).__name__
        return result
    rng = np.random.default_rng(0)
    entry = _DATA[name]
    weights, modules = (_of_transformers if "weights" in entry else _of_mlx)(entry, model, rng)
    taken_in: Any = model
    if hasattr(model, "sanitize"):
        taken_in.sanitize({key: mx.array(value) for key, value in weights.items()})
    result.names = "transformers" if "weights" in entry else "mlx-lm"
    tensors: dict[str, Tensors] = {}
    deltas: dict[str, mx.array] = {}
    for path, module in modules.items():
        tensors[path], deltas[path] = _adapter(path, module, rng)
    _try(name, model, weights, modules, tensors, deltas, result)
    return result


def _try(
    name: str,
    model: nn.Module,
    weights: Tensors,
    modules: Mapping[str, _Module],
    tensors: dict[str, Tensors],
    deltas: Mapping[str, mx.array],
    result: Outcome,
) -> None:
    left = set(tensors)
    weights_of: dict[str, ModuleWeights] = {}
    while left:
        config = {
            "peft_type": "LORA",
            "r": _RANK,
            "lora_alpha": _RANK * _SCALE,
            "target_modules": sorted(left),
        }
        mapped = map_onto(
            model,
            PeftConfig.from_values(config, name),
            {key: value for path in sorted(left) for key, value in tensors[path].items()},
        )
        gone = {
            path: reason
            for problem in mapped.problems
            for path in left
            if f".{path}.lora_" in problem or f"module {path}:" in problem
            for reason in [problem.partition("not expected: ")[2] or problem]
        }
        left -= gone.keys()
        result.refused |= {_LAYER.sub("*", path): _LAYER.sub("*", why) for path, why in gone.items()}
        if mapped.problems and not gone:
            result.wrong += mapped.problems
            return
        if not mapped.problems:
            weights_of = mapped.weights
            break
    if not left:
        return
    merged = {key: mx.array(value) for key, value in weights.items()}
    for path in left:
        merged[modules[path].weight] = merged[modules[path].weight] + deltas[path]
    before, after = _taken_in(name, weights), _taken_in(name, merged)
    kinds = dict(named_base_modules(model))
    for path, value in before.items():
        wanted = np.array(after[path] - value)
        module, _, leaf = path.rpartition(".")
        own = weights_of.get(module) if leaf == "weight" else None
        got = np.zeros_like(wanted)
        if own is not None:
            product = own.scale * np.array(own.lora_a @ own.lora_b)
            got = product if kind_of(kinds[module]) is ModuleKind.EMBEDDING else product.T
        if got.shape != wanted.shape or np.abs(got - wanted).max(initial=0) > _TOLERANCE:
            result.wrong.append(path)
    result.exact = len(left)
    rows = {path: modules[path].shape[1 if modules[path].kind == "transposed" else 0] for path in left}
    places = Places(model, rows)
    for path in left:
        result.changes |= set(_changes(path, modules[path], places.of(path)))


def _changes(path: str, module: _Module, places: tuple[Arrival, ...]) -> Iterator[str]:
    if any(one.module != path for one in places):
        yield "renamed"
    if len(places) > 1:
        yield "split"
    if any(one.is_part for one in places):
        yield "joined"
    if any(one.factors is not None for one in places):
        yield "multiplied"
    if any(one.rows is not None and (np.diff(one.rows) != 1).any() for one in places):
        yield "permuted"
    if module.kind == "transposed":
        yield "transposed"


def _built(name: str) -> nn.Module:
    if name not in _DATA:
        raise ValueError("no tiny config for it is known (tests/architectures/architectures.json)")
    file = importlib.import_module(f"mlx_lm.models.{name.partition(',')[0]}")
    mx.random.seed(0)
    return file.Model(file.ModelArgs.from_dict(json.loads(json.dumps(_DATA[name]["config"]))))


def _taken_in(name: str, weights: Tensors) -> Tensors:
    """What a new model's own loading makes of `weights`."""
    model: Any = _built(name)
    weights = {key: mx.array(value) for key, value in weights.items()}
    return model.sanitize(weights) if hasattr(model, "sanitize") else weights


def _of_transformers(
    entry: Mapping[str, Any], model: nn.Module, rng: np.random.Generator
) -> tuple[Tensors, dict[str, _Module]]:
    """A checkpoint as transformers writes it, and the modules as it has them in memory."""
    shapes: dict[str, tuple[int, ...]] = {}
    for template, kinds in entry["weights"].items():
        for shape, layers in kinds:
            for layer in layers:
                shapes[template.replace("*", str(layer), 1)] = tuple(shape)
    modules = {}
    embeddings = {weight for kind, weight in entry["modules"].values() if kind == "embedding"}
    for template, (kind, weight) in entry["modules"].items():
        if kind == "linear" and weight in embeddings:
            continue  # a tied head, of which the tests of PEFT's own logits know more
        layers = [layer for _, layers in entry["weights"].get(f"{weight}.weight", ()) for layer in layers]
        for layer in layers:
            key = f"{weight}.weight".replace("*", str(layer), 1)
            modules[template.replace("*", str(layer), 1)] = _Module(kind, key, cast(Any, shapes[key]))
    weights = {key: mx.array(rng.normal(0, 0.1, shape).astype(np.float32)) for key, shape in shapes.items()}
    return weights, modules


def _of_mlx(
    entry: Mapping[str, Any], model: nn.Module, rng: np.random.Generator
) -> tuple[Tensors, dict[str, _Module]]:
    """A checkpoint with the names of the MLX model, and its modules."""
    checkpoint = checkpoint_of(model)
    weights = {
        key: mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32)) for key, value in checkpoint.items()
    }
    flat = dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))
    weights |= {key: value for key, value in flat.items() if key not in weights}
    # What loading makes of other modules has their names and sizes instead.
    unmade = entry.get("unmade", {"remove": [], "add": {}})
    gone = {key for key in weights if _LAYER.sub("*", key.removesuffix(".weight")) in unmade["remove"]}
    layers = sorted({found[0] for key in gone if (found := _LAYER.search(key)) is not None})
    weights = {key: value for key, value in weights.items() if key not in gone}
    added = {
        template.replace("*", layer): shape for template, shape in unmade["add"].items() for layer in layers
    }
    weights |= {
        f"{path}.weight": mx.array(rng.normal(0, 0.1, shape).astype(np.float32))
        for path, shape in added.items()
    }
    modules = {
        path: _Module(kind, f"{path}.weight", cast(Any, weights[f"{path}.weight"].shape))
        for path, module in named_base_modules(model)
        if (kind := _KINDS.get(kind_of(module))) is not None and f"{path}.weight" not in gone
    }
    modules |= {path: _Module("linear", f"{path}.weight", shape) for path, shape in added.items()}
    return weights, modules


def _adapter(path: str, module: _Module, rng: np.random.Generator) -> tuple[Tensors, mx.array]:
    """Random factors as PEFT names them, and what they add to the weight in the checkpoint."""
    rows, columns = reversed(module.shape) if module.kind == "transposed" else module.shape
    a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((_RANK, columns), (rows, _RANK)))
    delta = _SCALE * (b @ a)
    names = ("lora_A.weight", "lora_B.weight")
    factors = (a, b)
    if module.kind == "embedding":
        names, factors = ("lora_embedding_A", "lora_embedding_B"), (b.T, a.T)
    pairs = zip(names, factors, strict=True)
    tensors = {f"base_model.model.{path}.{leaf}": mx.array(np.ascontiguousarray(one)) for leaf, one in pairs}
    return tensors, mx.array(delta.T if module.kind == "transposed" else delta)


def table(outcomes: Mapping[str, Outcome]) -> str:
    """What docs/adapters.md says of them."""
    built = {name: one for name, one in outcomes.items() if one.not_built is None}
    partly = {name: one for name, one in built.items() if one.refused}
    files = {name.partition(",")[0] for name in outcomes}
    checked = sum(one.names == "transformers" for one in built.values())
    wrong = sum(bool(one.wrong) for one in built.values())
    lines = [
        f"mlx-lm {version('mlx-lm')} has {len(files)} architectures. {len(built)} tiny models of them, with "
        f"variants, were built: {checked} with the names and shapes of transformers {_TRANSFORMERS}, the "
        f"others with those of the MLX model. {len(built) - len(partly)} are exact in all linear layers and "
        f"embeddings, {len(partly)} in all but those that are refused, and {wrong} are wrong.",
        "",
        "| architecture | what loading changes | modules compared |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {', '.join(sorted(one.changes))} | {one.exact} |"
        for name, one in built.items()
        if one.changes
    ]
    lines += ["", "| refused | because | architectures |", "|---|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, one in partly.items():
        for path, reason in one.refused.items():
            key = path.rpartition(".")[2], re.sub(r"[\w.*]+\.(?=\w+, a )", "", reason)
            reasons.setdefault(key, []).append(f"`{name}`")
    lines += [f"| `{path}` | {reason} | {', '.join(names)} |" for (path, reason), names in reasons.items()]
    lines += ["", "| not built | because |", "|---|---|"]
    lines += [
        f"| `{name}` | {one.not_built} |" for name, one in outcomes.items() if one.not_built is not None
    ]
    return "\n".join(lines) + "\n"


def with_table(page: str, outcomes: Mapping[str, Outcome]) -> str:
    """The text of docs/adapters.md with the tables as they are now."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table(outcomes)}\n{_END}{after}"


def main() -> int:
    """Write the tables into the page; 1 if anything is wrong."""
    outcomes = {name: outcome(name) for name in architectures()}
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), outcomes), encoding="utf-8")
    for name, one in outcomes.items():
        sys.stdout.write(f"{name}: {one.not_built or f'{one.exact} exact'}\n")
        sys.stdout.writelines(f"  refused: {path}: {reason}\n" for path, reason in one.refused.items())
        sys.stdout.writelines(f"  WRONG: {path}\n" for path in one.wrong)
    return int(any(one.wrong for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Where the modules that a PEFT file names lie in one MLX model, and what loading made of their weights.

Names are those in the memory of transformers. `paths` has what a checkpoint calls them, `arrivals` what
mlx-lm makes of that; routers and experts lie where `routers` and `experts` say. Changes nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import mlx.nn as nn

from ...layers.modules import ModuleKind, kind_of, weight_shape
from ...layers.targets import named_base_modules
from .arrivals import Arrival, Arrivals, arrivals
from .experts import switch_block
from .factors import Shape
from .paths import PathRule, any_layer, rules_of
from .routers import router_place

__all__ = ["Places"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Places:
    """The places in one model of the modules of one adapter.

    `modules` are all of the model's by path, `adaptable` those of a kind; `rule` is how the file names them.
    """

    def __init__(
        self, model: nn.Module, rows: Mapping[str, int | None], wholes: Mapping[str, Shape] | None = None
    ) -> None:
        """`rows` has the modules that the file has factors for, and how many outputs (rows) these have.

        `wholes` has the shape of each parameter of the base that is in the file, by its full name.
        """
        self.modules = dict(named_base_modules(model))
        self.adaptable = {path: module for path, module in self.modules.items() if kind_of(module)}
        self._model = model
        self._tokens = _most_tokens(self.adaptable)
        self._rows = rows
        self._wholes = wholes or {}
        self.rule, self._arrivals = self._best_rule()
        self._names: dict[str, set[str]] = defaultdict(set)
        self._prefixes: dict[str, str] = {}
        for name in rows:
            for arrival in self.of(name):
                self._names[any_layer(arrival.module)].add(name)
                self._learn_prefix(name, arrival.module)

    def of(self, name: str) -> tuple[Arrival, ...]:
        """Where the weight of the module `name` is; empty if it is nowhere in the model."""
        return self._placed(name, self.rule, self._arrivals)

    def of_parameter(self, name: str) -> Arrival | None:
        """Where the parameter `name` is, if it is in one place."""
        module, _, parameter = name.rpartition(".")
        found = self._arrivals.found.get(f"{self.rule.to_mlx(module)}.{parameter}", ())
        return found[0] if len(found) == 1 else None

    def reason(self, name: str) -> str | None:
        """Why it is not known where the weight of the module `name` arrives, if that is so."""
        return self._arrivals.reasons.get(f"{self.rule.to_mlx(name)}.weight")

    def path_of(self, name: str) -> str | None:
        """The path of the module whose weight is that of the module `name`, all of it, if there is one."""
        found = self.of(name)
        return found[0].module if len(found) == 1 and found[0].index is None else None

    def names_of(self, path: str) -> tuple[str, ...]:
        """What transformers calls the modules that the one at `path` is made of, as far as it is known."""
        if known := self._names.get(any_layer(path)):
            layer = _NUMBER.search(path)
            number = "" if layer is None else layer[0]
            return tuple(sorted({_NUMBER.sub(number, name, count=1) for name in known}))
        for prefix in sorted(self._prefixes, key=len, reverse=True):
            if f"{path}.".startswith(prefix):
                return (f"{self._prefixes[prefix]}{path[len(prefix) :]}",)
        name = self.rule.to_peft(path)
        return () if name is None else (name,)

    def _best_rule(self) -> tuple[PathRule, Arrivals]:
        """The rule under which most modules have a place; the plainest of equals."""
        rules = rules_of(str(getattr(self._model, "model_type", "")))
        best = -1, rules[0], Arrivals()
        for rule in rules:
            found = self._arrivals_under(rule)
            hits = sum(
                bool(self._placed(name, rule, found)) or self._is_expert(name, rule) for name in self._rows
            )
            if hits > best[0]:
                best = hits, rule, found
            if hits == len(self._rows):
                break
        return best[1:]

    def _arrivals_under(self, rule: PathRule) -> Arrivals:
        shapes: dict[str, Shape] = {}
        for name, rows in self._rows.items():
            path = rule.to_mlx(name)
            if path is None or self._is_expert(name, rule):
                continue
            module = self.adaptable.get(path)
            # Rows of single tokens do not say how many there are.
            count = (rows or self._tokens) if module is None else weight_shape(module)[0]
            if count:
                shapes[f"{path}.weight"] = (count, 1)
        for parameter, shape in self._wholes.items():
            name, _, leaf = parameter.rpartition(".")
            path = rule.to_mlx(name)
            if path is not None and shape and shape[0]:
                shapes[f"{path}.{leaf}"] = shape
        return arrivals(self._model, shapes)

    def _placed(self, name: str, rule: PathRule, known: Arrivals) -> tuple[Arrival, ...]:
        path = rule.to_mlx(name)
        found = known.found.get(f"{path}.weight", ())
        if path is None or all(one.module in self.modules for one in found):
            return found
        router = router_place(self.adaptable, path)
        return () if router is None else (replace(found[0], path=f"{router}.weight"),)

    def _is_expert(self, name: str, rule: PathRule) -> bool:
        path = rule.to_mlx(name)
        return (
            path is not None and path not in self.modules and switch_block(self.adaptable, path) is not None
        )

    def _learn_prefix(self, name: str, path: str) -> None:
        """Keep what comes before the end that the two names have in common, if it is that of many modules."""
        names, paths = name.split("."), path.split(".")
        while names and paths and names[-1] == paths[-1]:
            names.pop()
            paths.pop()
        if not any(part.isdecimal() for part in (*names, *paths)):
            self._prefixes.setdefault(
                ".".join((*paths, "")) if paths else "", ".".join((*names, "")) if names else ""
            )


def _most_tokens(modules: Mapping[str, nn.Module]) -> int:
    """The rows of the largest embedding."""
    embeddings = (module for module in modules.values() if kind_of(module) is ModuleKind.EMBEDDING)
    return max((weight_shape(module)[0] for module in embeddings), default=0)

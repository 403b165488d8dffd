"""Shows an outcome: tables for people, JSON for programs. Measures nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import combinations
from statistics import median
from typing import Any

from pydantic import JsonValue
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import Load, LoadName, Measure
from benchmarks.environment import Environment, ModelFacts
from benchmarks.results import Outcome, Rounds, Spread, agreement, spread

__all__ = ["Report"]

_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """An outcome and what it depends on. `options` are the run's own, by name."""

    outcome: Outcome
    loads: dict[LoadName, Load]
    options: dict[str, JsonValue]
    model: ModelFacts
    environment: Environment
    seconds: float

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(self._measures())
        console.print(self._ratios())
        for line in self._footnotes():
            console.print(escape(line), highlight=False, soft_wrap=True)

    def to_json(self) -> str:
        """The whole report, every round of every measure, as one JSON object."""
        values: dict[str, Any] = {
            "schema": _SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "environment": dataclasses.asdict(self.environment),
            "model": dataclasses.asdict(self.model),
            "options": self.options,
            "loads": {name: dataclasses.asdict(load) for name, load in self.loads.items()},
            "ratios": [
                {
                    "case": case.name,
                    "name": result.ratio.name,
                    "numerator": dataclasses.asdict(result.ratio.numerator),
                    "denominator": dataclasses.asdict(result.ratio.denominator),
                    "rounds": result.rounds,
                    **dataclasses.asdict(result.spread),
                }
                for case, result in self._case_ratios()
            ],
            "measures": [
                {
                    "side": measure.side,
                    "load": measure.load,
                    "tokens_per_second": dataclasses.asdict(_rates(rounds)),
                    "first_token_seconds": dataclasses.asdict(_first_tokens(rounds)),
                    "rounds": [
                        {
                            "round": index,
                            "tokens_per_second": result.tokens_per_second,
                            "completion_tokens": result.completion_tokens,
                            **dataclasses.asdict(result),
                        }
                        for index, result in sorted(rounds.items())
                    ],
                }
                for measure, rounds in self.outcome.rounds.items()
            ],
            "same_answers": [
                {"left": str(left), "right": str(right), "same": same, "compared": compared}
                for left, right, same, compared in self._agreements()
            ],
            "notes": self.outcome.notes,
        }
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def _measures(self) -> Table:
        table = Table(title="Medians over the rounds, lowest to highest in brackets", title_justify="left")
        table.add_column("side, load", no_wrap=True)
        for heading in ("tokens/s", "first token, s", "seconds", "tokens", "cached", "rounds"):
            table.add_column(heading, justify="right")
        for measure, rounds in self.outcome.rounds.items():
            results = list(rounds.values())
            cached = sum(answer.cached_tokens for result in results for answer in result.answers)
            prompt = sum(answer.prompt_tokens for result in results for answer in result.answers)
            table.add_row(
                str(measure),
                _shown(_rates(rounds)),
                f"{_first_tokens(rounds).median:.2f}",
                f"{median(result.seconds for result in results):.1f}",
                f"{median(result.completion_tokens for result in results):.0f}",
                f"{cached / prompt:.0%}",
                str(len(results)),
            )
        return table

    def _ratios(self) -> Table:
        table = Table(title="Ratios of tokens/s, round by round", title_justify="left")
        table.add_column("ratio", no_wrap=True)
        table.add_column("median", justify="right")
        table.add_column("lowest to highest", justify="right")
        table.add_column("rounds", justify="right")
        for _, result in self._case_ratios():
            span = f"{result.spread.lowest:.2f} to {result.spread.highest:.2f}"
            table.add_row(
                result.ratio.name, f"{result.spread.median:.2f}", span, ", ".join(map(str, result.rounds))
            )
        return table

    def _footnotes(self) -> Iterator[str]:
        environment, base, mixed = self.environment, self.loads[LoadName.BASE], self.loads[LoadName.MIXED]
        yield (
            f"Loads: {base.requests} requests at once of at most {base.max_tokens} tokens, greedy; "
            f"mixed: over {mixed.adapters} adapters ({self.options['adapter_kind']})."
        )
        yield f"Model: {self.model.name}, {self.model.dtype}."
        yield f"Machine: {environment.processor}, {environment.cores} cores, {environment.system}."
        yield (
            f"MLX on {environment.device}, BLAS {environment.blas}, Python {environment.python}; "
            f"load average before the run {environment.load_average:.2f}."
        )
        yield "; ".join(f"{name} {version}" for name, version in environment.packages.items()) + "."
        for left, right, same, compared in self._agreements():
            yield f"Same answers, word for word: {left} and {right}: {same} of {compared}."
        if environment.device.startswith("CPU") and self.model.tensors.keys() & {"F16", "BF16"}:
            yield "Note: on a CPU, mlx-graft computes in float32; the other sides in the model's own type."
        for note in self.outcome.notes:
            yield f"Note: {note}"
        yield f"The whole run took {self.seconds:.0f} seconds."

    def _case_ratios(self) -> Iterator[tuple[Any, Any]]:
        cases = [case for case in self.outcome.cases for _ in case.ratios]
        return zip(cases, self.outcome.ratios(), strict=True)

    def _agreements(self) -> Iterator[tuple[Measure, Measure, int, int]]:
        """Sides that were asked the same: (left, right, same answers, answers compared)."""
        for left, right in combinations(self.outcome.rounds, 2):
            if left.load is right.load:
                yield left, right, *agreement(self.outcome.rounds[left], self.outcome.rounds[right])


def _rates(rounds: Rounds) -> Spread:
    return spread([result.tokens_per_second for _, result in sorted(rounds.items())])


def _first_tokens(rounds: Rounds) -> Spread:
    return spread([result.first_token_seconds for _, result in sorted(rounds.items())])


def _shown(values: Spread) -> str:
    return f"{values.median:.1f} ({values.lowest:.1f} to {values.highest:.1f})"

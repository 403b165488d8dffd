"""Decoding with an adapter for each row against the base, on a GPU; random weights in real models' shapes.

    python -m benchmarks.gpu [--models 8b 8b-4bit 1b] [--rows 1 8 32] [--kind dora] [--json FILE]

Needs an NVIDIA GPU and `mlx[cuda13]`; no model is downloaded. All sides run in one process and take turns.
Before anything is timed, all forms are checked against the plain products on the same rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama
from rich.console import Console
from rich.table import Table

from adapters_core.bank import AdapterBank, PreparedAdapter
from adapters_core.layers.modules import compute_dtype, weight_shape
from adapters_core.mixed.kernel import Kernels
from adapters_core.mixed.layout import GroupLayout, Projection, group_projections
from adapters_core.mixed.linear import MixedLinear
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.routing import AdapterRows, RoutedModel, Routing
from benchmarks.gpu_report import GpuProfile, GpuReport, GpuResult

_PROMPT_TOKENS = 32
_SCALE = 2.0
_SIZE = 0.02  # of the factors' entries: a delta of some percent of the base's outputs
_WARM_UP_STEPS = 8
_TOLERANCE = 0.005  # relative, of outputs in bfloat16, whose own precision is 0.004


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes; `bits` None is bfloat16."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    bits: int | None = None


SHAPES = {
    "1b": Shape(2048, 16, 8192, 32, 8),
    "8b": Shape(4096, 32, 14336, 32, 8),
    "8b-4bit": Shape(4096, 32, 14336, 32, 8, bits=4),
}
_VOCABULARY = 128256


class Sides:
    """One model with resident adapters, decoded in turn by several batches."""

    def __init__(self, shape: Shape, adapters: int, rank: int, kind: str) -> None:
        self.model: Any = _random_model(shape)
        self.routing = Routing()
        self.routed = RoutedModel(self.model, self.routing)
        self.forms = {
            "kernels with the base": Kernels(),
            "kernel": Kernels(with_base=False),
            "kernel, not compiled": Kernels(compiles=False),
            "products": None,
        }
        bank = AdapterBank(self.model, self.routing)
        self.adapters = [
            bank.add(_random_adapter(self.model, rank, kind, index)) for index in range(adapters)
        ]

    def use(self, form: str) -> None:
        """Compute adapters in this form from now on; "base" has none, so that it does not matter."""
        self.routing.kernels = self.forms.get(form)

    def rows(self, count: int, adapters: int) -> list[RowAdapters]:
        """`count` rows dealt to `adapters` adapters; 0 is the base."""
        if not adapters:
            return [()] * count
        return [make_row([(self.adapters[index % adapters], 1.0)]) for index in range(count)]

    def error(self, rows: Sequence[RowAdapters]) -> float:
        """The largest ‖form - products‖ / ‖products‖ of the outputs of the first layer's projections."""
        worst = 0.0
        for module in self.model.layers[0].modules():
            if not isinstance(module, MixedLinear):
                continue
            x = mx.random.normal((len(rows), 1, weight_shape(module.reverted())[1])).astype(mx.bfloat16)
            found = {}
            for form in self.forms:
                self.use(form)
                self.routing.plan = AdapterRows(rows).plan(self.routing)
                found[form] = module(x).astype(mx.float32)
            plain = found["products"]
            errors = [float(mx.linalg.norm(one - plain) / mx.linalg.norm(plain)) for one in found.values()]
            worst = max(worst, *errors)
        self.routing.plan = None
        return worst

    def profile(self, name: str, rows: Sequence[RowAdapters], side: str, steps: int) -> GpuProfile:
        """Decode greedily and time each part."""
        self.use(side)
        caches = [self.routed.new_cache(row) for row in rows]
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        tokens = mx.ones((len(rows),), dtype=mx.int32)
        parts: list[tuple[float, float, float]] = []
        for _ in range(steps + _WARM_UP_STEPS):
            start = time.perf_counter()
            logits = self.routed(tokens[:, None], cache=merged)[:, -1]
            after = mx.argmax(logits, axis=-1)
            built = time.perf_counter()
            mx.async_eval(after)
            submitted = time.perf_counter()
            mx.eval(tokens)
            parts.append((built - start, submitted - built, time.perf_counter() - submitted))
            tokens = after
        build, submit, wait = (1e3 * median(part) for part in zip(*parts[_WARM_UP_STEPS:], strict=True))
        return GpuProfile(
            model=name, rows=len(rows), side=side, build_ms=build, submit_ms=submit, wait_ms=wait
        )


class Batch:
    """Rows that decode without end, and the seconds that each block of steps took."""

    def __init__(self, sides: Sides, rows: Sequence[RowAdapters], form: str, max_tokens: int) -> None:
        self._sides = sides
        self._form = form
        self.block_seconds: list[float] = []
        sides.use(form)
        self._generator = BatchGenerator(
            sides.routed,  # pyright: ignore[reportArgumentType] (it calls the model, nothing else)
            completion_batch_size=len(rows),
            prefill_batch_size=len(rows),
        )
        self._generator.insert(
            [[1 + index] * _PROMPT_TOKENS for index in range(len(rows))],
            max_tokens=[max_tokens] * len(rows),
            caches=[sides.routed.new_cache(row) for row in rows],
        )
        while len(self._generator.next()[1]) < len(rows):
            pass

    def run(self, steps: int) -> None:
        """Decode `steps` times; the first two warm up."""
        self._sides.use(self._form)
        for _ in range(2):
            self._generator.next()
        start = time.perf_counter()
        for _ in range(steps):
            self._generator.next()
        self.block_seconds.append((time.perf_counter() - start) / steps)


def measure(
    name: str, row_counts: Sequence[int], rank: int, kind: str, blocks: int, steps: int
) -> tuple[list[GpuResult], list[GpuProfile]]:
    """Every side of one model. Raises: RuntimeError if the forms do not agree."""
    sides = Sides(SHAPES[name], max(row_counts), rank, kind)
    results: list[GpuResult] = []
    profiles: list[GpuProfile] = []
    for count in row_counts:
        error = sides.error(sides.rows(count, count))
        if error > _TOLERANCE:
            raise RuntimeError(f"{name}, {count} rows: the forms' outputs differ by {error:.4f}")
        max_tokens = (blocks + 1) * (steps + 2) + 16
        batches = {("base", 0): Batch(sides, sides.rows(count, 0), "base", max_tokens)}
        for adapters in sorted({1, count}):
            rows = sides.rows(count, adapters)
            for form in sides.forms:
                batches[form, adapters] = Batch(sides, rows, form, max_tokens)
        for batch in batches.values():
            batch.run(steps)
            batch.block_seconds.clear()
        for index in range(blocks):
            for batch in list(batches.values())[:: -1 if index % 2 else 1]:
                batch.run(steps)
        base = batches["base", 0].block_seconds
        for (side, adapters), batch in batches.items():
            ratios = [one / other for one, other in zip(base, batch.block_seconds, strict=True)]
            step_ms = 1e3 * median(batch.block_seconds)
            results.append(
                GpuResult(
                    model=name,
                    rows=count,
                    adapters=adapters,
                    side=side,
                    step_ms=step_ms,
                    ratio=median(ratios),
                    lowest=min(ratios),
                    highest=max(ratios),
                )
            )
        for side in ("base", *sides.forms):
            rows = sides.rows(count, 0 if side == "base" else count)
            profiles.append(sides.profile(name, rows, side, 2 * steps))
    return results, profiles


def _random_model(shape: Shape) -> nn.Module:
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=_VOCABULARY,
            tie_word_embeddings=False,
        )
    )
    # Part by part, so that the float32 weights that they are made from never lie there all at once.
    for part in (*model.layers, model.lm_head, model.model.embed_tokens, model):
        part.set_dtype(mx.bfloat16)
        mx.eval(part.parameters())
    if shape.bits is not None:
        nn.quantize(model, bits=shape.bits)
        mx.eval(model.parameters())
    model.eval()
    mx.clear_cache()
    return model


def _random_adapter(model: nn.Module, rank: int, kind: str, seed: int) -> PreparedAdapter:
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and ".layers." in f".{path}."
    }
    linears = {path.removesuffix(".linear"): module for path, module in linears.items()}
    groups: dict[str, GroupLayout] = {}
    rows: dict[str, mx.array] = {}
    key = mx.random.key(seed)
    for name, paths in group_projections({p: weight_shape(one)[1] for p, one in linears.items()}).items():
        parts = [Projection(path, rank, *weight_shape(linears[path])[::-1]) for path in paths]
        groups[name] = GroupLayout(tuple(parts), kind == "dora", compute_dtype(linears[paths[0]]))
        key, mine = mx.random.split(key)
        row = _SIZE * mx.random.normal((groups[name].size,), key=mine)
        if groups[name].is_dora:
            for factors in groups[name].factors.values():
                row[factors] += 1
        rows[name] = row.astype(groups[name].dtype)
    mx.eval(rows)
    size_bytes = sum(row.nbytes for row in rows.values())
    resident = ResidentAdapter(f"random-{seed}", kind, rank, _SCALE, tuple(sorted(linears)), size_bytes)
    return PreparedAdapter(resident, _SCALE, groups, rows)


def _environment() -> dict[str, Any]:
    info = mx.device_info(mx.default_device())
    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {"device": str(info.get("device_name")), "architecture": str(info.get("architecture")), **versions}


def _table(results: Sequence[GpuResult]) -> Table:
    table = Table(title="Decode steps; ratio: base ÷ side, in turn, lowest to highest", title_justify="left")
    for heading in ("model", "rows", "adapters", "side", "ms a step", "ratio", "spread"):
        table.add_column(heading, justify="left" if heading in ("model", "side") else "right")
    for one in results:
        numbers = f"{one.step_ms:.2f}", f"{one.ratio:.2f}", f"{one.lowest:.2f} to {one.highest:.2f}"
        table.add_row(one.model, str(one.rows), str(one.adapters), one.side, *numbers)
    return table


def _profile_table(profiles: Sequence[GpuProfile]) -> Table:
    table = Table(title="Where a step's time goes on the host, ms", title_justify="left")
    for heading in ("model", "rows", "side", "build", "submit", "wait"):
        table.add_column(heading, justify="left" if heading in ("model", "side") else "right")
    for one in profiles:
        numbers = (f"{value:.2f}" for value in (one.build_ms, one.submit_ms, one.wait_ms))
        table.add_row(one.model, str(one.rows), one.side, *numbers)
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kind", choices=("lora", "dora"), default="lora")
    parser.add_argument("--blocks", type=int, default=15, help="blocks of steps for each side, in turn")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a block")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if Routing().kernels is None:
        parser.error("MLX has no CUDA GPU here, so that no kernel of ours can run")
    console = Console(width=110)
    results: list[GpuResult] = []
    profiles: list[GpuProfile] = []
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    environment = _environment()
    console.print(environment)
    for at, name in enumerate(options.models, start=1):
        found = measure(name, options.rows, options.rank, options.kind, options.blocks, options.steps)
        console.print(_table(found[0]), _profile_table(found[1]))
        results += found[0]
        profiles += found[1]
        mx.clear_cache()
        if options.json:  # after each model, so that a run that is cut off keeps what it measured
            report = GpuReport(
                created=datetime.now(UTC).replace(microsecond=0),
                environment=environment,
                options={**asked, "models": options.models[:at]},
                results=results,
                profiles=profiles,
            )
            options.json.write_text(report.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    main()

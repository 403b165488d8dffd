"""Checks a model on this device: mixed rows against mlx-lm's own layers, the way back to the base, and speed.

What is under test is an argument, so that a test can plant an error. Runs on the thread that owns the model.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..container import AdapterContainer
from ..errors import AdapterError
from ..mixed.laying_out import float_dtype
from ..mixed.residents import ResidentAdapter, RowAdapters, make_row
from .adapters import BLEND, recipes, write_blend, write_recipe
from .bits import changes, fingerprint
from .report import CheckReport, Finding, Memory, Ratio
from .rows import Expected, Resident, batch_logits, expect, own_layers, reference_layers
from .speed import decoding_ratios, reading_ratios

__all__ = ["ROW_COUNTS", "check_model"]

ROW_COUNTS = (1, 8, 32)
_PROMPTS = 8
_PROMPT_TOKENS, _STEPS = 12, 3
_BASE, _BLEND = "base", "blend"
_ALLOWED_FLOAT32 = 1e-4
_ALLOWED_HALF = 0.02  # relative: what roundings to 8 bits of a row's many products add up to
_NOISE_FACTOR = 4  # allowed where the base itself differs by more between batches and single rows
_SHOWN_CHANGES = 3


def check_model(
    model: nn.Module,
    make: Callable[[nn.Module], Resident] = Resident,
    *,
    counts: Sequence[int] = ROW_COUNTS,
    with_speed: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> CheckReport:
    """Check `model`, which is evaluated, in eval mode and without adapters; it is then as it was.

    1. Write random adapters, and compute each by itself with mlx-lm's layers, one row at a time.
    2. Compute batches of `counts` rows by the bank that `make` gives; compare logits and greedy tokens, and
       the bits of rows without an adapter with those of the base in the same batch.
    3. Measure how fast these batches decode and read beside the base, if `with_speed`.
    4. Take the adapters out; load and unload, fuse and unfuse some by themselves; compare the base's bits.

    `progress` is told of each stage in a sentence.

    Raises: UnsupportedModelError: the model's layers cannot be reached, or rows cannot be served.
    """
    start, model_bytes = time.perf_counter(), mx.get_active_memory()
    before = fingerprint(model)
    with tempfile.TemporaryDirectory(prefix="mlx-graft-check-") as folder:
        progress("Writing random adapters …")
        adapters = _written(model, Path(folder))
        progress(f"Computing {len(adapters)} adapters one at a time with mlx-lm's layers …")
        expected, sources = _expected(model, adapters)
        findings = [_unchanged("mlx-lm's layers in and out", model, before)]
        mx.reset_peak_memory()
        resident = make(model)
        try:
            noise = _noise(resident, expected, counts)
            usual = _ALLOWED_FLOAT32 if float_dtype(model) == mx.float32 else _ALLOWED_HALF
            allowed = max(usual, _NOISE_FACTOR * noise)
            checked = _Checked(resident, adapters, expected, sources, allowed)
            for count in counts:
                progress(f"Comparing {count} mixed row(s) …")
                findings += checked.findings(count)
            ratios: list[Ratio] = []
            if with_speed:
                for count in counts:
                    progress(f"Measuring {count} row(s) …")
                    ratios += checked.ratios(count)
            memory = Memory(model_bytes, resident.bank.resident_bytes, mx.get_peak_memory())
            layouts = len({place.layout for place in resident.routing.placements.values()})
        finally:
            resident.bank.close()
        findings.append(_unchanged("adapters in and out of a batch", model, before))
        progress("Loading, unloading, fusing and unfusing …")
        findings += _life_cycle(model, adapters, expected, allowed, before)
    return CheckReport(
        dtype=str(float_dtype(model)).removeprefix("mlx.core."),
        noise=noise,
        findings=tuple(findings),
        ratios=tuple(ratios),
        memory=memory,
        forms=_forms(resident),
        layouts=layouts,
        seconds=time.perf_counter() - start,
    )


def _written(model: nn.Module, root: Path) -> dict[str, Path]:
    """The folders of all adapters, and of the one that the blend amounts to, by name."""
    folders: dict[str, Path] = {}
    for seed, recipe in enumerate(recipes(model), start=1):
        folders[recipe.name] = root / recipe.name
        write_recipe(model, recipe, folders[recipe.name], seed)
    write_blend([(folders[name], weight) for name, weight in BLEND], root / _BLEND)
    return {**folders, _BLEND: root / _BLEND}


def _expected(model: nn.Module, adapters: dict[str, Path]) -> tuple[dict[str, Expected], set[str]]:
    """What the base and each adapter answer alone, by name, the base for each prompt; and whose layers."""
    vocabulary = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
    prompts = mx.random.randint(0, vocabulary, (_PROMPTS, _PROMPT_TOKENS), key=mx.random.key(7))
    found = {_name_of_base(at): expect(model, prompts[at], _STEPS) for at in range(_PROMPTS)}
    sources: set[str] = set()
    for at, (name, folder) in enumerate(adapters.items()):
        layers, source = reference_layers(model, folder)
        sources.add(source)
        with layers:
            found[name] = expect(model, prompts[at % _PROMPTS], _STEPS)
    return found, sources


def _name_of_base(prompt: int) -> str:
    return f"{_BASE} {prompt}"


@dataclass
class _Checked:
    """Adapters in a bank, and what each of their rows is expected to answer."""

    resident: Resident
    folders: dict[str, Path]
    expected: dict[str, Expected]
    sources: set[str]
    allowed: float
    _loaded: dict[str, ResidentAdapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, folder in self.folders.items():
            if name != _BLEND:
                self._loaded[name] = self.resident.bank.add(AdapterContainer.from_directory(folder))

    def row(self, name: str) -> RowAdapters:
        """What the row of this name computes with."""
        if name.startswith(_BASE):
            return ()
        terms = BLEND if name == _BLEND else [(name, 1.0)]
        return make_row([(self._loaded[part], weight) for part, weight in terms])

    def findings(self, count: int) -> list[Finding]:
        """What batches of `count` rows give; of one row, each adapter by itself."""
        batches = {name: [name] for name in self.folders} if count == 1 else self.batches(count)
        return [found for name, names in batches.items() for found in self._compared(name, names)]

    def batches(self, count: int) -> dict[str, list[str]]:
        """The names of the rows of each batch, dealt out in order."""
        every = [name for name in self.folders if name.startswith("lora") and "experts" not in name]
        widest = [name for name in every if name.endswith("-all")]
        dora = [name for name in self.folders if name.startswith("dora")]
        base = _name_of_base(0)
        mixes = {
            "one adapter": widest[1:2],
            "three ranks": widest,
            "nine layouts": every,
            "LoRA with DoRA": [name for pair in zip(every, dora, strict=False) for name in pair],
            "with base rows": [widest[1], base],
            "everything": [_BLEND, base, *reversed(self.folders), _name_of_base(1)],
        }
        return {mix: [names[at % len(names)] for at in range(count)] for mix, names in mixes.items() if names}

    def ratios(self, count: int) -> list[Ratio]:
        """How fast batches of `count` rows are beside the base."""
        batches = self.batches(count)
        if count == 1:
            batches = {"LoRA": ["lora-16-all"], "DoRA": [n for n in self.folders if n.startswith("dora")][:1]}
        sides = {
            mix: [self.row(name) for name in names]
            for mix, names in batches.items()
            if names and mix not in ("everything", "one adapter" if count > 8 else "")
        }
        routed = self.resident.routed
        return [*decoding_ratios(routed, sides), *reading_ratios(routed, sides)]

    def _logits(self, names: Sequence[str], *, with_adapters: bool = True) -> mx.array:
        rows = [self.row(name) if with_adapters else () for name in names]
        fed = mx.stack([self.expected[name].fed for name in names])
        return batch_logits(self.resident.routed, rows, fed, _STEPS)

    def _other_tokens(self, found: mx.array, expected: mx.array) -> int:
        """How many greedy choices of a row differ by more than a tie: `allowed` of the largest logit."""
        chosen = mx.argmax(found, axis=-1, keepdims=True)
        lost = mx.max(expected, axis=-1) - mx.take_along_axis(expected, chosen, axis=-1)[:, 0]
        return cast(int, mx.sum(lost > self.allowed * mx.max(mx.abs(expected), axis=-1)).item())

    def _compared(self, mix: str, names: Sequence[str]) -> list[Finding]:
        """A batch against what its rows are expected to answer, and its base rows against the base's bits."""
        logits = self._logits(names)
        wanted = [self.expected[name].logits for name in names]
        errors = list(map(_error, logits, wanted))
        others = sum(map(self._other_tokens, logits, wanted))
        worst = max(range(len(names)), key=errors.__getitem__)
        effect = min(self._effect(name) for name in names)
        note = ""
        if effect <= 2 * self.allowed:
            note = f"an adapter changes the logits by {effect:.2g} only, too little to be told from an error"
        elif errors[worst] > self.allowed:
            note = f"worst in row {worst}, {names[worst]}"
        passed = not note and not others
        count = len(names)
        what = f"{mix}, alone" if count == 1 else f"{mix}, {count} rows"
        against = " and ".join(sorted(self.sources))
        found = [
            Finding(
                what,
                against,
                passed,
                error=errors[worst],
                allowed=self.allowed,
                tokens=sum(one.shape[0] for one in wanted),
                other_tokens=others,
                note=note,
            )
        ]
        if base := [row for row, name in enumerate(names) if name.startswith(_BASE)]:
            alone = self._logits(names, with_adapters=False)
            other = [row for row in base if not mx.array_equal(logits[row], alone[row]).item()]
            note = f"other bits in {len(other)} of {len(base)} rows, first {other[0]}" if other else ""
            found.append(Finding(f"{what}: base rows", "the base's bits in that batch", not other, note=note))
        return found

    def _effect(self, name: str) -> float:
        """How much an adapter changes of the first logits, relative; infinite for the base."""
        if name.startswith(_BASE):
            return math.inf
        place = list(self.folders).index(name) % _PROMPTS
        return _error(self.expected[name].logits[0], self.expected[_name_of_base(place)].logits[0])


def _error(found: mx.array, expected: mx.array) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where something is not finite."""
    error = cast(float, (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item())
    return error if math.isfinite(error) else math.inf


def _noise(resident: Resident, expected: dict[str, Expected], counts: Sequence[int]) -> float:
    """The largest error of the base's rows in batches of `counts` rows."""
    found = 0.0
    for count in counts:
        wanted = [expected[_name_of_base(at % _PROMPTS)] for at in range(count)]
        fed = mx.stack([one.fed for one in wanted])
        logits = batch_logits(resident.routed, [()] * count, fed, _STEPS)
        found = max(found, *map(_error, logits, [one.logits for one in wanted]))
    return found


def _life_cycle(
    model: nn.Module,
    adapters: dict[str, Path],
    expected: dict[str, Expected],
    allowed: float,
    before: dict[str, object],
) -> list[Finding]:
    """Adapters loaded and unloaded, fused and unfused by themselves, one LoRA and one DoRA."""
    findings: list[Finding] = []
    for name in [name for name in adapters if name in ("lora-32-all", "dora-8-qv")]:
        wanted = expected[name]
        with own_layers(model, adapters[name]):
            found = expect(model, wanted.prompt, 0).logits
        error = _error(found, wanted.logits[:1])
        findings.append(
            Finding(f"{name} loaded", "mlx-lm's layers", error <= allowed, error=error, allowed=allowed)
        )
        findings.append(_unchanged(f"{name} loaded and unloaded", model, before))
    for name in [name for name in adapters if name in ("lora-8-qv", "dora-8-qv")]:
        what = f"{name} fused and unfused"
        try:
            fusion = AdapterContainer.from_directory(adapters[name]).fuse(with_=model)
        except AdapterError as error:
            findings.append(Finding(what, "the base's bits", False, note=str(error)))
            continue
        fusion.undo()
        findings.append(_unchanged(what, model, before))
    return findings


def _unchanged(what: str, model: nn.Module, before: dict[str, object]) -> Finding:
    """Whether the model is bit for bit as it was `before`."""
    changed = changes(before, fingerprint(model))
    note = ""
    if changed:
        note = f"{len(changed)} differ: {', '.join(changed[:_SHOWN_CHANGES])}"
    return Finding(what, "the base's modules and bits", not changed, note=note)


def _forms(resident: Resident) -> dict[str, object]:
    """How rows with adapters are computed here."""
    return {"kernels": resident.routing.kernels is not None, **asdict(resident.routing.forms)}

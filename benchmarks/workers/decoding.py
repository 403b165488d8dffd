"""Decode steps of one model with adapters, batch beside batch; takes the model folder.

Reads JSON lines from standard input and answers each with one. `{"batches": {NAME: [FOLDER or null, …]}}`
makes batches, a row for each adapter's folder and null for the base, and leaves those that were there.
`{"batches_of": [NAME, …], "steps": n, "turns": n}` lets each of them decode so many steps in turn and answers
with the seconds of one step by name, one number a turn. The batches are of mlx-lm's BatchGenerator, over the
layers that the server has.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from server.cache_dir import default_cache_dir
from server.cli.serve import prepare_mlx

prepare_mlx(default_cache_dir())

from mlx_lm.generate import BatchGenerator  # noqa: E402 (MLX may be imported only from here on)

from adapters_core.container import AdapterContainer  # noqa: E402
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row  # noqa: E402
from benchmarks.workers.generators import private_output  # noqa: E402
from server.engine.calibration import with_forms  # noqa: E402
from server.engine.context import ModelContext  # noqa: E402
from server.engine.model import load_model  # noqa: E402

_PROMPT_TOKENS = 32
_WARM_UP_STEPS = 2
_MOST_TOKENS = 1 << 20


def main() -> None:
    """Answer lines until the input ends."""
    answers = private_output()
    loaded = with_forms(load_model(sys.argv[1]), default_cache_dir())
    context = ModelContext.build(loaded, prompt_cache_bytes=0)
    resident: dict[str, ResidentAdapter] = {}
    batches: dict[str, BatchGenerator] = {}
    for line in sys.stdin:
        wanted = json.loads(line)
        found: dict[str, list[float]] = {}
        if "batches" in wanted:
            for name, folders in wanted["batches"].items():
                for folder in folders:
                    if folder is not None and folder not in resident:
                        resident[folder] = context.bank.add(AdapterContainer.from_directory(folder))
                rows = [() if one is None else make_row([(resident[one], 1.0)]) for one in folders]
                batches[name] = _batch(context, rows)
                _step_seconds(batches[name], 1)
        else:
            found = {name: [] for name in wanted["batches_of"]}
            for turn in range(wanted["turns"]):
                for name in list(found)[:: -1 if turn % 2 else 1]:
                    found[name].append(_step_seconds(batches[name], wanted["steps"]))
        print(json.dumps(found), file=answers, flush=True)


def _batch(context: ModelContext, rows: Sequence[RowAdapters]) -> BatchGenerator:
    """Rows that decode without end, their prompts read."""
    generator = BatchGenerator(
        context.routed,  # pyright: ignore[reportArgumentType] (it calls the model, nothing else)
        completion_batch_size=len(rows),
        prefill_batch_size=len(rows),
    )
    generator.insert(
        [[1 + index] * _PROMPT_TOKENS for index in range(len(rows))],
        max_tokens=[_MOST_TOKENS] * len(rows),
        caches=[context.routed.new_cache(row) for row in rows],
    )
    while len(generator.next()[1]) < len(rows):
        pass
    return generator


def _step_seconds(generator: BatchGenerator, steps: int) -> float:
    for _ in range(_WARM_UP_STEPS):
        generator.next()
    start = time.perf_counter()
    for _ in range(steps):
        generator.next()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    main()

"""Adapters of embeddings and experts in continuous batches: rows that come, are padded, and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_core.container import AdapterContainer
from adapters_core.layers.modules import ModuleKind
from adapters_core.layers.targets import default_keys
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.positions import keep_positions
from tests.engine.support import make_context, prompts, reference, run, submit
from tests.mixed.architectures import tiny
from tests.mixed.resident import load_with_mlx_lm, only, paths_of
from tests.models import make_adapter

NAMES = [
    "qwen3, tied head",
    "gemma3, sliding windows",
    "afm7, split query, key and value",
    "mixtral, tied head",
    "olmoe, flat tokens and biases",
    "nemotron_h, recurrent, SwitchMLP",
    "qwen3_next, recurrent, experts",
]


@pytest.mark.parametrize("name", NAMES)
def test_continuous_batches_give_mlx_lms_tokens(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    keep_positions(model)
    keys = [*default_keys(model), *paths_of(model, ModuleKind.EMBEDDING)]
    folders = [
        make_adapter(tmp_path / str(seed), model, keys=keys, seed=seed, rank=rank, size=0.1)
        for seed, rank in ((1, 4), (2, 4), (3, 6))
    ]
    context = make_context(model)
    loop = GenerationLoop(context, LoopOptions(max_batch_size=4, prefill_batch_size=2, prefill_step_tokens=8))
    rows = [(), *(only(context.bank.add(AdapterContainer.from_directory(one))) for one in folders)]
    asked = prompts([3, 21, 9, 14, 2, 30])
    found = run(
        loop,
        *(submit(str(at), prompt, max_tokens=4 + at, row=rows[at % 4]) for at, prompt in enumerate(asked)),
    )
    for at, prompt in enumerate(asked):
        alone = tiny(name)
        if at % 4:
            load_with_mlx_lm(alone, folders[at % 4 - 1])
            alone.eval()
        assert found.tokens(str(at)) == reference(alone, prompt, 4 + at)

"""A saved model is whole or not there, and its progress is told, over HTTP too."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from server.adapters.errors import ModelNotSavedError, UnmergedModelError
from server.adapters.fusing.progress import FuseProgress
from server.adapters.saving.folders import MODELS, SavedFolders
from server.adapters.saving.models import ModelDraft, config_of
from tests.adapters.support import BASE, Site, house
from tests.models import tiny_llama


@contextmanager
def no_large_files(limit_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `limit_bytes`: a disk that is full halfway through one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_disk_that_fills_up_leaves_nothing(model_path: Path, root: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    async with house(model_path, root, models_dir=models) as saver:
        await saver.service.load("a")
        bits = await saver.snapshot()
        with no_large_files(100_000), pytest.raises(ModelNotSavedError):
            await saver.service.save_fused("a", "auto", "x")
        assert os.listdir(models) == []
        assert await saver.snapshot() == bits
        await saver.service.save_fused("a", "auto", "x")
        assert os.listdir(models) == ["x"]


async def test_a_model_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    asked: list[Path] = []

    def nothing_free(folder: Path) -> int:
        asked.append(folder)
        return 10

    draft = ModelDraft(SavedFolders(tmp_path, MODELS, nothing_free), "x")
    with pytest.raises(ModelNotSavedError, match="10 are free"):
        draft.write(tiny_llama(), None)  # pyright: ignore[reportArgumentType]
    assert asked == [tmp_path]
    assert os.listdir(tmp_path) == []


async def test_what_is_kept_unmerged_cannot_be_saved(model_path: Path, root: Path, tmp_path: Path) -> None:
    async with house(model_path, root, models_dir=tmp_path) as saver:
        await saver.service.load("a")
        before = os.listdir(tmp_path)
        with pytest.raises(UnmergedModelError):
            await saver.service.save_fused("a", "keep", "x")
        assert os.listdir(tmp_path) == before


async def test_progress_is_told_stage_by_stage(model_path: Path, root: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    async with house(model_path, root, models_dir=models) as saver:
        await saver.service.load("a")
        told: list[FuseProgress] = []
        await saver.service.save_fused("a", "auto", "x", told.append)
        await asyncio.sleep(0)
    stages = list(dict.fromkeys(step.stage for step in told))
    assert stages == ["merging", "comparing", "writing"]
    for stage in stages:
        done = [step.done for step in told if step.stage == stage]
        totals = {step.total for step in told if step.stage == stage}
        assert done == sorted(done)
        assert {done[-1]} == totals
    written = sum(file.stat().st_size for file in (models / "x").glob("*.safetensors"))
    assert 0 < told[-1].total <= written


async def _events(site: Site, body: dict[str, Any]) -> list[Any]:
    async with site.client.stream("POST", "/v1/adapters/a/fuse", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines if not line.startswith(":")]


async def test_progress_as_events(tiny_site: Site, tmp_path: Path) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    *steps, report, done = await _events(tiny_site, {"save_to": "streamed", "stream": True})
    assert done == "[DONE]"
    assert (report["object"], report["saved_to"]) == ("adapter.fusion", "streamed")
    assert {step["object"] for step in steps} == {"adapter.fusion.progress"}
    assert steps[0]["stage"] == "merging"
    assert {step["stage"] for step in steps} >= {"merging", "comparing"}
    assert os.listdir(tmp_path / "models") == ["streamed"]

    # What can be refused at once is an ordinary reply; what fails later is an event, without [DONE].
    again = {"save_to": "streamed", "stream": True}
    await tiny_site.refused("POST", "/v1/adapters/a/fuse", again, 409, "model_exists")
    with no_large_files(100_000):
        *_, failed = await _events(tiny_site, {"save_to": "too-large", "stream": True})
    assert failed["error"]["code"] == "model_not_saved"
    assert os.listdir(tmp_path / "models") == ["streamed"]

    *_, report, done = await _events(tiny_site, {"stream": True})
    assert (report["saved_to"], done) == (None, "[DONE]")
    assert await tiny_site.says(BASE) == await tiny_site.says("a")


def test_layers_with_other_bits_than_the_rest_are_described() -> None:
    model: Any = tiny_llama(0, 4)
    finer = nn.Linear(64, 64).to_quantized(32, 8)
    model.layers[1].self_attn.q_proj = finer
    model.layers[2].self_attn.q_proj = nn.Linear(64, 64)
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    assert config_of(config, model)["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.1.self_attn.q_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
    }

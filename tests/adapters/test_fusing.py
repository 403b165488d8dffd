"""Fuse, unfuse and save: what the base answers, and that it is bit for bit what it was afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from server.adapters.bare import bare_copy
from server.adapters.errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterNotFoundError,
    AdapterNotFusedError,
    AdaptersLoadedError,
    BaseIsFusedError,
    ModelExistsError,
    ModelNotSavedError,
    PathNotAllowedError,
    UnknownModelError,
)
from server.adapters.saving.models import config_of
from server.engine.container import ModelContainer
from server.engine.context import ModelContext
from tests.adapters.support import (
    Held,
    House,
    greedy,
    house,
    make_adapters,
    read_model,
    tokens_of,
    write_model,
)
from tests.models import logits, make_adapter, relative_error, tiny_llama


async def state(tiny_house: House) -> tuple[object, ...]:
    """What a call that fails must leave as it was."""
    registry = tiny_house.service.registry
    entries = [
        (entry.id, entry.current.number, entry.state, entry.current.resident.digest)
        for entry in registry.entries
    ]
    return entries, registry.active, registry.fused, await tiny_house.residents()


@pytest.mark.parametrize("name", ["a", "d"])
async def test_the_fused_base_answers_as_the_adapter_and_is_itself_again(
    tiny_house: House, name: str
) -> None:
    service = tiny_house.service
    before = await tiny_house.snapshot()
    base, adapted = await tiny_house.answer("tiny"), await tiny_house.answer(name)
    assert base != adapted
    result = await service.fuse(name, "auto")
    kept = await tiny_house.engine.container.perform(lambda context: context.prompt_cache.stats.entries)
    assert kept == 0  # what was computed with the bare base
    assert (result.report.modules, result.report.precision) == (9, {"dense": 9})
    assert result.report.error_worst < 1e-3
    assert service.registry.get(name).state == "fused"
    assert await tiny_house.residents() == 0
    for asked in ("tiny", name, f"tiny:{name}", None):
        assert await tiny_house.answer(asked) == adapted
    for refused in (
        service.resolve("b"),
        service.resolve(None, [(name, 0.5)]),
        service.load("b"),
        service.load(name, replace=True),
        service.unload(name),
        service.swap("b"),
        service.fuse(name, "auto"),
        service.save_fused(name, "auto", "x"),
    ):
        with pytest.raises(BaseIsFusedError):
            await refused
    with pytest.raises(AdapterNotFoundError):
        await service.unfuse("b")

    entry = await service.unfuse(name)
    assert entry.state == "ready"
    assert await tiny_house.answer("tiny") == base
    assert await tiny_house.answer(name) == adapted
    with pytest.raises(AdapterNotFusedError):
        await service.unfuse(name)
    await service.unload(name)
    assert await tiny_house.snapshot() == before


async def test_fusing_again_and_at_another_precision_shares_no_cache(tmp_path: Path) -> None:
    model = write_model(tmp_path / "quantised", quantize_bits=4)
    root = make_adapters(tmp_path / "adapters", read_model(model))
    async with house(model, root) as quantised:
        service = quantised.service
        before = await quantised.snapshot()
        await service.load("a")
        found: dict[str, list[int]] = {}
        for precision in ("requantize", "dequantize", "keep", "auto", "requantize"):
            report = (await service.fuse("a", precision)).report
            assert sum(report.precision.values()) == report.modules == 9
            answer = await quantised.answer("tiny")
            assert found.setdefault(precision, answer) == answer
            expected = await quantised.engine.container.perform(lambda context: greedy(context.model))
            assert answer == expected
            await service.unfuse("a")
        await service.unload("a")
        assert await quantised.snapshot() == before


async def test_others_are_unloaded_only_if_that_is_said(tiny_house: House) -> None:
    service = tiny_house.service
    await service.load("a")
    await service.load("b", activate=True)
    before = await state(tiny_house)
    with pytest.raises(AdaptersLoadedError) as raised:
        await service.fuse("a", "auto")
    assert raised.value.details == {"adapters": ["b"]}
    assert await state(tiny_house) == before
    await service.fuse("a", "auto", unload_others=True)
    assert [entry.id for entry in service.registry.entries] == ["a"]
    assert service.registry.active is None
    assert (await service.swap("a")).previous is None
    await service.unfuse("a")
    with pytest.raises(UnknownModelError):
        await service.resolve("b")


async def test_fusing_waits_for_requests_and_holds_new_ones_back(tiny_house: House) -> None:
    service = tiny_house.service
    base, adapted = await tiny_house.answer("tiny"), await tiny_house.answer("a")
    pin = await service.resolve("tiny")
    fusing = asyncio.create_task(service.fuse("a", "auto"))
    async with asyncio.timeout(20):
        while True:
            late = asyncio.create_task(service.resolve("tiny"))
            await tiny_house.engine.container.perform(lambda context: None)
            if not late.done():
                break
            late.result().release()
    assert await tokens_of(tiny_house.generate(pin)) == base
    await fusing
    assert await tokens_of(tiny_house.generate(await late)) == adapted


async def test_a_fusion_that_waits_for_a_long_request_lets_others_go_on(tiny_house: House) -> None:
    service = tiny_house.service
    base, adapted = await tiny_house.answer("tiny"), await tiny_house.answer("a")
    long = await service.resolve("tiny")
    fusing = asyncio.create_task(service.fuse("a", "auto"))
    async with asyncio.timeout(20):
        while True:  # until one is held back
            late = asyncio.create_task(service.resolve("tiny"))
            await tiny_house.engine.container.perform(lambda context: None)
            if not late.done():
                break
            late.result().release()

    pin = await asyncio.wait_for(late, 10)  # long before the fusion gives up
    assert not fusing.done()
    assert await tokens_of(tiny_house.generate(pin)) == base
    assert await tokens_of(tiny_house.generate(long)) == base
    await fusing
    assert await tiny_house.answer("tiny") == adapted


async def test_a_fusion_gives_up_when_its_time_is_up(model_path: Path, root: Path) -> None:
    async with house(model_path, root, unload_timeout_seconds=0.3) as short:
        service = short.service
        await service.load("a")
        before = await state(short)
        pin = await service.resolve("tiny")
        with pytest.raises(AdapterBusyError, match=r"Within 0.3 s .* 1 request") as raised:
            await service.fuse("a", "auto")
        assert raised.value.details == {"in_flight": 1}
        assert await state(short) == before
        other = await asyncio.wait_for(service.resolve("tiny"), 10)
        other.release()
        pin.release()


async def test_a_fusion_that_finds_requests_in_flight_changes_nothing(model_path: Path, root: Path) -> None:
    async with house(model_path, root, unload_timeout_seconds=0) as hasty:
        service = hasty.service
        await service.load("a")
        bits, before = await hasty.snapshot(), await state(hasty)
        pin = await service.resolve("tiny")
        with pytest.raises(AdapterBusyError):
            await service.fuse("a", "auto")
        assert await state(hasty) == before
        assert await hasty.snapshot() == bits
        pin.release()
        await service.fuse("a", "auto")
        pin = await service.resolve("tiny")
        with pytest.raises(AdapterBusyError):
            await service.unfuse("a")
        pin.release()
        await service.unfuse("a")


async def test_a_draining_or_changed_adapter_is_not_fused(tiny_house: House, model_path: Path) -> None:
    service = tiny_house.service
    await service.load("a")
    await service.load("b")
    pin = await service.resolve("b")
    unloading = asyncio.create_task(service.unload("b"))
    await tiny_house.until(lambda: service.registry.get("b").state == "draining")
    with pytest.raises(AdapterBusyError):
        await service.fuse("a", "auto", unload_others=True)
    pin.release()
    await unloading
    service.keeper.drop(service.registry.get("a").current)
    make_adapter(tiny_house.root / "a", read_model(model_path), seed=99)
    before = await state(tiny_house)
    with pytest.raises(AdapterChangedError):
        await service.fuse("a", "auto")
    assert await state(tiny_house) == before


class Stumbling(ModelContainer):
    """Hands everything to a real container, but for the updates that drain once `stumbles` is set."""

    def __init__(self, inner: ModelContainer) -> None:
        super().__init__(inner._post)
        self._inner = inner
        self.stumbles = False

    async def update(self, fn: Callable[[ModelContext], Any], *, drain: bool = False) -> Any:
        stumble = drain and self.stumbles
        return await self._inner.update(
            (lambda context: self._half(context, fn)) if stumble else fn, drain=drain
        )

    async def perform(self, fn: Callable[[ModelContext], Any]) -> Any:
        return await self._inner.perform(fn)

    @staticmethod
    def _half(context: ModelContext, fn: Callable[[ModelContext], Any]) -> Any:
        if context.fusion is None:
            context.bank.close()
            raise RuntimeError("half way through fusing")
        bank, context.bank = context.bank, cast(AdapterBank, Unwilling())
        try:
            return fn(context)
        finally:
            context.bank = bank


class Unwilling:
    """A bank that takes nothing."""

    def add(self, adapter: AdapterContainer) -> None:
        raise RuntimeError("half way through unfusing")


@pytest.mark.parametrize("gone", [None, "b"])
async def test_adapters_come_back_when_the_exchange_fails(
    model_path: Path, root: Path, gone: str | None
) -> None:
    async with house(model_path, root, wrap=Stumbling) as unlucky:
        service, container = unlucky.service, unlucky.container
        assert isinstance(container, Stumbling)
        bits = await unlucky.snapshot()
        answers = {name: await unlucky.answer(name) for name in ("tiny", "a", "b", "d")}
        await service.swap("b")
        container.stumbles = True
        if gone is not None:
            shutil.rmtree(root / gone)
            service.keeper.drop(service.registry.get(gone).current)
        with pytest.raises(RuntimeError, match="half way"):
            await service.fuse("a", "auto", unload_others=True)
        assert service.registry.fused is None
        assert service.registry.served == list(answers)
        assert service.registry.active == "b"
        if gone is not None:
            with pytest.raises(AdapterNotFoundError):
                await unlucky.answer(gone)
            await service.unload(gone)
            del answers[gone]
        assert {name: await unlucky.answer(name) for name in answers} == answers
        assert await unlucky.residents() == len(answers) - 1
        for name in answers.keys() - {"tiny"}:
            await service.unload(name)
        assert await unlucky.snapshot() == bits


async def test_what_was_loaded_while_a_fusion_was_computed_leaves_no_copies(
    model_path: Path, root: Path
) -> None:
    async with house(model_path, root, wrap=Held) as held:
        service, container = held.service, held.container
        assert isinstance(container, Held)
        for name in ("a", "b"):
            await service.load(name)
        container.holds_next = True
        fusing = asyncio.create_task(service.fuse("a", "auto", unload_others=True))
        try:
            async with asyncio.timeout(20):
                await container.reached.wait()
            await service.load("d")
            await service.load("b", "d", replace=True)
        finally:
            container.open.set()  # or the house could not close
        await fusing
        assert {version.source.shown for version in service.registry.versions} == {"a"}
        (copy,) = [version.copy for version in service.registry.versions]
        assert copy is not None
        assert service.keeper.bytes_held == copy.size_bytes
        await service.unfuse("a")
        await service.unload("a")
        assert service.keeper.bytes_held == 0


async def test_the_base_stays_fused_when_unfusing_fails(model_path: Path, root: Path) -> None:
    async with house(model_path, root, wrap=Stumbling) as unlucky:
        service, container = unlucky.service, unlucky.container
        assert isinstance(container, Stumbling)
        base, adapted = await unlucky.answer("tiny"), await unlucky.answer("a")
        await service.fuse("a", "auto")
        container.stumbles = True
        with pytest.raises(RuntimeError, match="half way"):
            await service.unfuse("a")
        assert (service.registry.fused, service.registry.get("a").state) == ("a", "fused")
        assert await unlucky.answer("tiny") == adapted
        container.stumbles = False
        await service.unfuse("a")
        assert await unlucky.answer("tiny") == base
        assert await unlucky.answer("a") == adapted


async def test_a_saved_model_is_one_that_mlx_lm_loads(model_path: Path, root: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    async with house(model_path, root, models_dir=models) as saver:
        service = saver.service
        adapted = await saver.answer("a")
        await service.load("b")
        bits, before = await saver.snapshot(), await state(saver)
        result = await service.save_fused("a", "auto", "fused-a")
        assert result.saved_to == "fused-a"
        assert await saver.snapshot() == bits
        assert await state(saver) == before
        assert os.listdir(models) == ["fused-a"]
        model, tokenizer = mlx_lm.load(str(models / "fused-a"))[:2]
        assert greedy(model) == adapted
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"

        with pytest.raises(ModelExistsError):
            await service.save_fused("a", "auto", "fused-a")
        for name in ("../x", "/etc/x", "", ".", "a/b", "x" * 200, "a\n", ".hidden"):
            with pytest.raises(PathNotAllowedError):
                await service.save_fused("a", "auto", name)
        results = await asyncio.gather(
            *(service.save_fused("a", "auto", "twice") for _ in range(2)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["FuseResult", "ModelExistsError"]
        assert sorted(os.listdir(models)) == ["fused-a", "twice"]


async def test_a_model_that_cannot_be_written_leaves_nothing(
    model_path: Path, root: Path, tmp_path: Path
) -> None:
    no_folder = tmp_path / "models"
    no_folder.write_text("")
    async with house(model_path, root, models_dir=no_folder) as saver:
        await saver.service.load("a")
        bits, before = await saver.snapshot(), await state(saver)
        with pytest.raises(ModelNotSavedError) as raised:
            await saver.service.save_fused("a", "auto", "x")
        assert str(tmp_path) not in str(raised.value)
        assert await saver.snapshot() == bits
        assert await state(saver) == before
        assert no_folder.read_text() == ""


async def test_saving_needs_a_models_root(tiny_house: House) -> None:
    await tiny_house.service.load("a")
    with pytest.raises(PathNotAllowedError, match="--models-dir"):
        await tiny_house.service.save_fused("a", "auto", "x")


@pytest.mark.parametrize("precision", ["requantize", "dequantize", "auto"])
async def test_a_saved_quantised_model_keeps_its_layers_as_they_are(tmp_path: Path, precision: str) -> None:
    model_path = write_model(tmp_path / "quantised", quantize_bits=4)
    config = json.loads((model_path / "config.json").read_text())
    # As models with mixed quantisation have it: an entry for a layer by its path.
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    config["quantization"]["model.layers.0.self_attn.q_proj"] = entry
    (model_path / "config.json").write_text(json.dumps(config))
    root = make_adapters(tmp_path / "adapters", read_model(model_path))
    models = tmp_path / "models"
    models.mkdir()
    async with house(model_path, root, models_dir=models) as quantised:
        await quantised.service.load("a")
        await quantised.service.save_fused("a", precision, "saved")  # pyright: ignore[reportArgumentType]
    saved = read_model(models / "saved")
    expected = read_model(model_path)
    AdapterContainer.from_directory(root / "a").fuse(expected, precision)  # pyright: ignore[reportArgumentType]
    assert relative_error(logits(saved), logits(expected)) < 1e-4
    kinds = [type(module).__name__ for module in saved.model.layers[0].self_attn.leaf_modules().values()]
    assert kinds == [
        type(module).__name__ for module in expected.model.layers[0].self_attn.leaf_modules().values()
    ]


def test_a_bare_copy_shares_arrays_and_no_modules() -> None:
    model = tiny_llama()
    copy = bare_copy(model)
    assert isinstance(copy, llama.Model)
    assert not {id(module) for module in copy.modules()} & {id(module) for module in model.modules()}
    ours, theirs = dict(tree_flatten(copy.parameters())), dict(tree_flatten(model.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(ours[path] is theirs[path] for path in ours)
    np.testing.assert_array_equal(logits(copy), logits(model))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    shared = bare_copy(model)
    assert shared.model.layers[1].mlp is shared.model.layers[0].mlp


def test_a_model_without_quantised_layers_is_described_as_such() -> None:
    config = {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}, "model_type": "llama"}
    assert config_of(config, tiny_llama()) == {"model_type": "llama"}
    assert "quantization" in config

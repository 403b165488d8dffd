"""Several adapters fused at once, and what the report says of the outputs, over a real engine."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError
from adapters_core.fusing.fusion import fuse_layers
from adapters_core.fusing.sums import summed_layers
from adapters_core.layers.surgery import replace_modules
from server.adapters.errors import (
    AdapterNotFoundError,
    AdapterNotFusedError,
    AdaptersLoadedError,
    BaseIsFusedError,
)
from server.adapters.fusing.probes import CONVERSATIONS, probe_rows
from tests.adapters.support import BASE, House, Site, greedy, house, make_adapters, read_model, write_model

SUM = [("a", 0.7), ("b", -0.5)]


async def test_a_fused_sum_answers_as_the_blend_of_a_request(tiny_house: House) -> None:
    service, registry = tiny_house.service, tiny_house.service.registry
    before = await tiny_house.snapshot()
    answers = {name: await tiny_house.answer(name) for name in (BASE, "a", "b", "d")}
    blended = await tiny_house.answer(None, SUM)
    assert blended not in answers.values()
    await service.swap("b")
    with pytest.raises(AdaptersLoadedError) as raised:
        await service.fuse(SUM, "auto")
    assert raised.value.details == {"adapters": ["d"]}
    result = await service.fuse(SUM, "auto", unload_others=True)
    assert (result.id, result.terms, result.report.precision) == ("a", SUM, {"dense": 9})

    assert registry.served == [BASE]
    assert [(entry.id, entry.state) for entry in registry.entries] == [("a", "fused"), ("b", "fused")]
    assert (registry.fused, registry.active) == ("a", None)
    for name in (BASE, None, "default"):
        assert await tiny_house.answer(name) == blended
    # Neither is what the base answers with, so neither may be named.
    for refused in (
        service.resolve("a"),
        service.resolve("b"),
        service.resolve("d"),
        service.resolve(None, SUM),
        service.swap("a"),
        service.load("a", replace=True),
        service.fuse("a", "auto"),
    ):
        with pytest.raises(BaseIsFusedError):
            await refused
    with pytest.raises(AdapterNotFusedError):
        await service.unfuse("b")

    await service.unfuse("a")
    assert registry.served == [BASE, "a", "b"]
    del answers["d"]
    assert {name: await tiny_house.answer(name) for name in answers} == answers
    for name in ("a", "b"):
        await service.unload(name)
    assert await tiny_house.snapshot() == before


async def test_a_weighted_adapter_is_not_what_its_name_means(tiny_house: House) -> None:
    service = tiny_house.service
    await service.load("a")
    half = await tiny_house.answer(None, [("a", 0.5)])
    await service.fuse([("a", 0.25), ("a", 0.25)], "auto")
    assert await tiny_house.answer(BASE) == half
    with pytest.raises(BaseIsFusedError):
        await service.resolve("a")
    await service.unfuse("a")


async def test_what_nobody_has_named_yet_is_loaded_to_be_fused(tiny_house: House, model_path: Path) -> None:
    service = tiny_house.service
    assert (await service.fuse(SUM, "auto")).terms == SUM
    assert await tiny_house.answer(BASE) == await _sum_of(tiny_house.root, model_path)
    with pytest.raises(BaseIsFusedError):
        await service.fuse("d", "auto")
    await service.unfuse("a")
    assert service.registry.served == [BASE, "a", "b"]
    await service.unload("b")
    for call in (service.fuse(SUM, "auto"), service.save_fused("b", "auto", "x")):
        with pytest.raises(AdapterNotFoundError, match="A call unloaded it, and a call can load it"):
            await call
    for name in ("nowhere", "a@1", "tiny", "", "../a"):
        with pytest.raises(AdapterNotFoundError):
            await service.fuse([("a", 1.0), (name, 1.0)], "auto")
    assert (service.registry.served, service.registry.fused) == ([BASE, "a"], None)


async def _sum_of(root: Path, model_path: Path) -> list[int]:
    """What mlx-lm answers with the sum merged."""
    model = read_model(model_path)
    terms = [(AdapterContainer.from_directory(root / name), weight) for name, weight in SUM]
    modules, _ = fuse_layers(summed_layers(model, terms), "auto", "sum")
    replace_modules(model, modules)
    return greedy(model)


async def test_what_is_no_sum_is_refused_and_changes_nothing(tiny_house: House) -> None:
    service = tiny_house.service
    for name in ("a", "b", "d"):
        await service.load(name)
    before = await tiny_house.snapshot(), service.registry.served
    for terms in ([("a", 1.0), ("d", 1.0)], [("d", 0.5)], [("a", 0.0)], [("a", 1.0), ("b", 0.0)]):
        with pytest.raises(BlendError):
            await service.fuse(terms, "auto", unload_others=True)
        with pytest.raises(BlendError):
            await service.save_fused(terms, "auto", "x")
    with pytest.raises(AdapterNotFoundError):
        await service.fuse([("a", 1.0), ("nowhere", 1.0)], "auto", unload_others=True)
    assert (await tiny_house.snapshot(), service.registry.served) == before


@pytest.mark.parametrize("precision", ["requantize", "auto"])
async def test_a_saved_sum_is_what_mlx_lm_answers_with(tmp_path: Path, precision: str) -> None:
    model_path = write_model(tmp_path / "quantised", quantize_bits=4)
    root = make_adapters(tmp_path / "adapters", read_model(model_path))
    models = tmp_path / "models"
    models.mkdir()
    async with house(model_path, root, models_dir=models) as saver:
        for name in ("a", "b"):
            await saver.service.load(name)
        await saver.service.save_fused(SUM, precision, "sum")  # pyright: ignore[reportArgumentType]
        await saver.service.fuse(SUM, precision)  # pyright: ignore[reportArgumentType]
        resident = await saver.answer(BASE)
    assert greedy(mlx_lm.load(str(models / "sum"))[0]) == resident


async def test_the_report_compares_outputs_on_the_built_in_prompts(tmp_path: Path) -> None:
    model_path = write_model(tmp_path / "quantised", quantize_bits=4)
    root = make_adapters(tmp_path / "adapters", read_model(model_path))
    async with house(model_path, root, fuse_threshold=0.02) as quantised:
        await quantised.service.load("a")
        found = {}
        for precision in ("requantize", "auto", "keep"):
            found[precision] = await quantised.service.fuse("a", precision)
            await quantised.service.unfuse("a")
        rows = await quantised.engine.container.perform(lambda context: probe_rows(context.tokenizer, 4096))
    assert len(rows) == len(CONVERSATIONS)
    adapter = AdapterContainer.from_directory(root / "a")
    adapted, fused = read_model(model_path), read_model(model_path)
    adapter.fuse(adapted, "keep")
    AdapterContainer.from_directory(root / "a").fuse(fused, "requantize")
    same: list[bool] = []
    divergences: list[float] = []
    for row in rows:
        p, q = (np.array(mx.softmax(model(mx.array([row]))[0], axis=-1)) for model in (adapted, fused))
        same += list(p.argmax(axis=-1) == q.argmax(axis=-1))
        divergences += list((p * np.log(p / q)).sum(axis=-1))
    lossy = found["requantize"].activations
    assert (lossy.prompts, lossy.tokens) == (len(rows), len(same))
    assert lossy.agreement == np.mean(same)
    assert lossy.kl_mean == pytest.approx(np.mean(divergences), rel=1e-2, abs=1e-6)
    assert lossy.kl_max == pytest.approx(np.max(divergences), rel=1e-2, abs=1e-6)
    assert found["auto"].report.threshold == 0.02
    assert found["auto"].report.error_worst <= 0.02
    assert found["auto"].activations.kl_mean < lossy.kl_mean
    kept = found["keep"]
    assert kept.report.precision == {"unmerged": 9}
    assert (kept.activations.agreement, kept.activations.error_worst) == (1.0, 0.0)


async def test_sums_over_http(tiny_site: Site) -> None:
    for name in ("a", "b"):
        await tiny_site.call("POST", "/v1/adapters", {"id": name}, status=201)
    blend = [{"id": name, "weight": weight} for name, weight in SUM]
    base, blended = await tiny_site.says(BASE), await tiny_site.says(None, adapters=blend)
    fuse = "/v1/adapters/a/fuse"
    report = await tiny_site.call("POST", fuse, {"weight": 0.7, "adapters": blend[1:]})
    assert report["adapters"] == blend
    assert set(report["activations"]) == {
        *("prompts", "tokens", "error_mean", "error_worst", "worst_module", "agreement", "kl_mean", "kl_max"),
    }
    assert report["bytes_after"] == report["bytes_before"] > 0
    assert report["threshold"] == 0.05
    assert await tiny_site.says(BASE) == blended
    error = (await tiny_site.chat("b", status=409))["error"]
    assert (error["code"], error["details"]) == ("base_is_fused", {"fused": "a", "adapters": blend})
    assert "A sum of adapters ('a' x 0.7, 'b' x -0.5), for which only the base's name" in error["message"]
    assert [model["id"] for model in (await tiny_site.call("GET", "/v1/models"))["data"]] == [BASE]
    await tiny_site.call("DELETE", fuse)
    assert await tiny_site.says(BASE) == base
    await tiny_site.call("POST", "/v1/adapters", {"id": "d"}, status=201)
    for body in ({"adapters": [{"id": "d"}]}, {"adapters": [{"id": "b"}, {"id": "d", "weight": 0.5}]}):
        error = await tiny_site.refused("POST", fuse, body, 400, "not_blendable")
        assert error["message"].startswith("A DoRA adapter ('d') rescales the base,")
    for body, status, code in (
        ({"adapters": [{"id": "b", "weight": 0}]}, 400, "not_blendable"),
        ({"adapters": [{"id": "nowhere"}]}, 404, "adapter_not_found"),
        ({"adapters": [{"id": "b", "weigth": 1}]}, 400, "unknown_parameter"),
        ({"precision": "keep", "save_to": "x"}, 400, "not_mergeable"),
    ):
        await tiny_site.refused("POST", fuse, body, status, code)


async def test_a_named_blend_is_made_again_and_fused(tiny_site: Site) -> None:
    parts = [{"id": "a", "weight": 0.5}, {"id": "b", "weight": 0.5}]
    await tiny_site.call("POST", "/v1/adapters", {"id": "mix", "blend": parts}, status=201)
    mixed, base = await tiny_site.says("mix"), await tiny_site.says(BASE)
    await tiny_site.call("POST", "/v1/adapters/mix/fuse", {"unload_others": True})
    assert await tiny_site.says(BASE) == await tiny_site.says("mix") == mixed
    await tiny_site.call("DELETE", "/v1/adapters/mix/fuse")
    assert (await tiny_site.says(BASE), await tiny_site.says("mix")) == (base, mixed)

"""The load report over HTTP: with every load, and of one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from adapters_core.container import AdapterContainer
from adapters_core.formats.writing import write_adapter
from tests.adapters.support import BASE, Site, house, read_model
from tests.models import make_adapter


def write_peft(site: Site, source: str, name: str, base_name: str | None) -> Path:
    """The adapter `source` of the site once more, in PEFT's format."""
    model = read_model(site.model)
    weights = AdapterContainer.from_directory(site.root / source).check(model)
    write_adapter(site.root / name, weights, "peft", model, base_name=base_name)
    return site.root / name


async def load(site: Site, name: str, status: int = 201, **fields: Any) -> Any:
    return await site.call("POST", "/v1/adapters", {"id": name, **fields}, status=status)


async def test_every_load_and_one_adapter_show_the_report(tiny_site: Site) -> None:
    write_peft(tiny_site, "a", "p", f"someone/{BASE}-4bit")
    loaded = await load(tiny_site, "p")
    one = await tiny_site.call("GET", "/v1/adapters/p")
    assert one["report"] == loaded["report"]
    report = dict(one["report"])
    assert report.pop("digest") == one["digest"]
    assert report == {
        "format": "peft",
        "type": "lora",
        "base_name": f"someone/{BASE}-4bit",
        "modules": 9,
        "kinds": {"linear": 9},
        "names": {"k_proj": 3, "q_proj": 3, "v_proj": 3},
        "layers": [0, 1, 2],
        "ranks": [4],
        "scales": [2.0],
        "dtypes": ["float32"],
        "tensor_bytes": (3 * 64 + 64 + 32 + 32) * 4 * 3 * 4,
        "ignored_fields": [],
        "warnings": [],
    }
    assert one["format"] == "peft"
    (listed,) = (await tiny_site.call("GET", "/v1/adapters"))["data"]
    assert "report" not in listed
    assert await tiny_site.says("p") == await tiny_site.says("a")


async def test_another_base_is_a_warning_in_the_report_and_in_the_log(tiny_site: Site) -> None:
    write_peft(tiny_site, "a", "p", "someone/Other-1B")
    with capture_logs() as logs:
        (warning,) = (await load(tiny_site, "p"))["report"]["warnings"]
    assert "'someone/Other-1B'" in warning
    assert f"'{BASE}'" in warning
    assert [line["warning"] for line in logs if line["event"] == "adapter_report"] == [warning]


async def test_a_new_version_has_its_own_report(tiny_site: Site) -> None:
    assert (await load(tiny_site, "a"))["report"]["ranks"] == [4]
    make_adapter(tiny_site.root / "a", read_model(tiny_site.model), rank=6, seed=42)
    assert (await load(tiny_site, "a", status=200, replace=True))["report"]["ranks"] == [6]
    assert (await tiny_site.call("GET", "/v1/adapters/a"))["report"]["ranks"] == [6]
    await tiny_site.call("POST", "/v1/adapters/a/rollback")
    assert (await tiny_site.call("GET", "/v1/adapters/a"))["report"]["ranks"] == [4]


async def test_what_was_loaded_on_demand_has_one_too(tiny_site: Site) -> None:
    await tiny_site.says("d")
    report = (await tiny_site.call("GET", "/v1/adapters/d"))["report"]
    assert (report["type"], report["kinds"], report["warnings"]) == ("dora", {"linear": 9}, [])


async def test_what_a_folder_holds_by_the_time_it_is_read_again_is_reported(
    model_path: Path, own_root: Path, size_bytes: int
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        make_adapter(own_root / "a", read_model(model_path), scale=0.0)
        with capture_logs() as logs:
            assert await tight.answer("a") == await tight.answer(None)
        version = tight.service.registry.get("a").current
    assert version.resident.report is not None
    assert version.resident.report.warnings[0].startswith("The adapter changes nothing")
    (told,) = [line for line in logs if line["event"] == "adapter_report"]
    assert (told["adapter"], told["version"]) == ("a", 2)
    assert told["warning"] == version.resident.report.warnings[0]

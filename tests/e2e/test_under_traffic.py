"""Adapters are changed while answers are streamed, and clients leave: the streams go on unharmed.

The model is a tiny one in a real process; a stream is compared with what mlx-lm says with the same adapter.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.adapters.support import BASE, read_model
from tests.e2e.running import Served, error_of, serving, until
from tests.e2e.streams import ENDLESS_TOKENS, NO_END, WORDS, Stream, reference, write_long_model
from tests.models import make_adapter

ADAPTER = "/v1/adapters/pirate"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_model(tmp_path_factory.mktemp("models") / BASE)


@pytest.fixture(scope="module")
def written(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, outside of what is served."""
    folder = tmp_path_factory.mktemp("written")
    for seed, (name, kind) in enumerate([("pirate", "lora"), ("shakespeare", "dora"), ("json", "lora")]):
        make_adapter(folder / name, read_model(model_path), kind, seed=seed)
    return folder


@pytest.fixture(scope="module")
def adapters_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "adapters"


@pytest.fixture(scope="module")
def process(
    model_path: Path, adapters_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    adapters_root.mkdir()
    errors = tmp_path_factory.mktemp("logs") / "errors.log"
    with serving(errors, "serve", str(model_path), "--adapters-dir", str(adapters_root)) as served:
        yield served


@pytest.fixture
def server(process: Served, adapters_root: Path, written: Path) -> Served:
    """Only the pirate is loaded, as it was written; so are the other folders."""
    shutil.rmtree(adapters_root)
    shutil.copytree(written, adapters_root)
    for name in process.adapters():
        process.ask("DELETE", f"/v1/adapters/{name}")
    process.ask("POST", "/v1/adapters", 201, json={"id": "pirate"})
    return process


@contextmanager
def streaming(server: Served, tokens: int = ENDLESS_TOKENS) -> Iterator[Stream]:
    """The pirate's answer, some of which has come."""
    stream = Stream(server, "pirate", tokens)
    try:
        yield stream
    finally:
        stream.leave()


def say(server: Served, model: str) -> tuple[str, int]:
    """A short answer to the question, and how many tokens of the prompt were cached."""
    body = {**WORDS, "model": model, "max_tokens": 12, "logit_bias": NO_END}
    answer = server.ask("POST", "/v1/chat/completions", json=body)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], cached


# Changes


def test_a_stream_stays_on_the_weights_that_it_began_with(
    server: Served, adapters_root: Path, written: Path, model_path: Path
) -> None:
    old, _ = say(server, "pirate")
    with streaming(server) as stream:
        server.ask("POST", "/v1/adapters", 201, json={"id": "json"})
        stream.more()
        server.ask("PUT", "/v1/adapters/active", json={"id": "json"})
        stream.more()

        shutil.copytree(written / "shakespeare", adapters_root / "pirate", dirs_exist_ok=True)
        replaced = server.ask("POST", "/v1/adapters", 200, json={"id": "pirate", "replace": True})
        assert (replaced["version"], replaced["type"], replaced["in_flight"]) == (2, "dora", 1)
        stream.more()

        new, cached = say(server, "pirate")
        assert cached == 0, "caches of version 1 were used for version 2"
        server.ask("POST", "/v1/adapters", 201, json={"id": "shakespeare"})
        again, cached = say(server, "shakespeare")
        assert again == new
        assert cached > 0, "the same content has the same caches"
        assert new != old
        stream.more()

        swapped = server.ask("PUT", "/v1/adapters/active", json={"id": None, "unload_previous": True})
        assert (swapped["active"], swapped["previous"]) == (None, "json")
        assert "json" not in server.adapters()
        server.ask("DELETE", "/v1/adapters/shakespeare")
        stream.more()
        assert server.adapters()["pirate"]["in_flight"] == 1
        tokens = stream.leave()
    assert tokens == reference(model_path, written / "pirate", len(tokens))

    until(lambda: server.adapters()["pirate"]["in_flight"] == 0)
    # The stream left its caches behind, of the same prompt: they are version 1's alone.
    assert say(server, "pirate")[0] == new

    shutil.copytree(written / "pirate", adapters_root / "pirate", dirs_exist_ok=True)
    third = server.ask("POST", "/v1/adapters", 200, json={"id": "pirate", "replace": True})
    assert (third["version"], third["type"]) == (3, "lora")
    assert say(server, "pirate")[0] == old


def test_what_is_unloaded_is_gone_for_others_at_once_and_stays_for_its_stream(
    server: Served, written: Path, model_path: Path
) -> None:
    with streaming(server) as stream, ThreadPoolExecutor(1) as pool:
        unload = pool.submit(server.ask, "DELETE", ADAPTER, params={"timeout_seconds": 120})
        until(lambda: server.adapters()["pirate"]["state"] == "draining")
        body = {**WORDS, "model": "pirate"}
        refused = server.ask("POST", "/v1/chat/completions", 404, json=body)
        assert error_of(refused)["code"] == "model_not_found"
        stream.more()
        assert not unload.done()
        tokens = stream.leave()
        unloaded = unload.result()
    assert tokens == reference(model_path, written / "pirate", len(tokens))
    assert unloaded["in_flight"] == 0
    assert unloaded["freed_bytes"] > 0
    assert error_of(server.ask("GET", ADAPTER, 404))["code"] == "adapter_not_found"
    # Unloaded by a call, it does not come back by itself.
    assert error_of(server.ask("POST", "/v1/chat/completions", 404, json=body))["code"] == "model_not_found"


def test_a_busy_adapter_is_ready_again_when_the_time_is_up(server: Served) -> None:
    with streaming(server) as stream:
        refused = error_of(server.ask("DELETE", ADAPTER, 409, params={"timeout_seconds": 0.2}))
        assert refused["code"] == "adapter_busy"
        adapter = server.adapters()["pirate"]
        assert (adapter["state"], adapter["in_flight"]) == ("ready", 1)
        assert say(server, "pirate")[0]
        stream.more()


# Loads that fail


def _tensors(folder: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    return tensors


def _with(folder: Path, **changes: mx.array | None) -> None:
    """The folder's tensors written anew: the first replaced or left out (None), or others put in."""
    tensors = _tensors(folder)
    new = {min(tensors) if key == "first" else key: value for key, value in changes.items()}
    kept = {key: value for key, value in {**tensors, **new}.items() if value is not None}
    mx.save_safetensors(str(folder / "adapters.safetensors"), kept)


def _truncate(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _huge_header(folder: Path) -> None:
    (folder / "adapters.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def _configured(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _leave_the_root(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    shutil.copytree(folder, outside)
    shutil.rmtree(folder)
    folder.symlink_to(outside)


BAD: dict[str, tuple[Callable[[Path], Any], int]] = {
    "truncated": (_truncate, 422),
    "empty": (lambda folder: (folder / "adapters.safetensors").write_bytes(b""), 422),
    "garbage": (lambda folder: (folder / "adapters.safetensors").write_bytes(b"\x07garbage" * 99), 422),
    "huge-header": (_huge_header, 422),
    "nan": (lambda folder: _with(folder, first=mx.full((64, 4), float("nan"))), 422),
    "missing": (lambda folder: _with(folder, first=None), 422),
    "extra": (lambda folder: _with(folder, stray=mx.zeros((2, 2))), 422),
    "misshapen": (lambda folder: _with(folder, first=mx.zeros((3, 5))), 422),
    "no-config": (lambda folder: (folder / "adapter_config.json").unlink(), 422),
    "no-json": (lambda folder: (folder / "adapter_config.json").write_text("{"), 422),
    "unknown-type": (lambda folder: _configured(folder, fine_tune_type="magic"), 422),
    "other-rank": (lambda folder: _configured(folder, lora_parameters={"rank": 3, "scale": 1.0}), 422),
    "no-match": (lambda folder: _configured(folder, lora_parameters={"rank": 8, "keys": ["nothing"]}), 422),
    "outside": (_leave_the_root, 403),
}


def test_loads_that_fail_during_a_stream_change_nothing(
    server: Served, adapters_root: Path, written: Path, model_path: Path
) -> None:
    before = {name: _lasting(adapter) for name, adapter in server.adapters().items()}
    with streaming(server, tokens=400) as stream:
        for name, (spoil, status) in BAD.items():
            shutil.copytree(written / "pirate", adapters_root / name)
            spoil(adapters_root / name)
            refused = error_of(server.ask("POST", "/v1/adapters", status, json={"id": name}))
            if status == 422:
                assert refused["code"] == "adapter_invalid", name
                assert refused["details"], name
                body = {"id": "pirate", "path": name, "replace": True}
                assert error_of(server.ask("POST", "/v1/adapters", 422, json=body)) == refused, name
        error_of(server.ask("POST", "/v1/adapters", 404, json={"id": "a/b"}))
        for adapter_id in ("../pirate", BASE, "x" * 300, "a\nb", "default"):
            error_of(server.ask("POST", "/v1/adapters", 400, json={"id": adapter_id}))
        error_of(server.ask("POST", "/v1/adapters", 403, json={"id": "other", "path": "../../etc"}))
        error_of(server.ask("POST", "/v1/adapters", 409, json={"id": "pirate"}))
        assert {name: _lasting(adapter) for name, adapter in server.adapters().items()} == before
        assert stream.rest() == reference(model_path, written / "pirate", 400)


def _lasting(adapter: dict[str, Any]) -> dict[str, Any]:
    """What requests do not change."""
    return {name: adapter[name] for name in ("id", "digest", "version", "state", "type", "path", "active")}


# Clients that leave


def test_who_closes_a_stream_frees_the_adapter(server: Served) -> None:
    with streaming(server):
        assert server.adapters()["pirate"]["in_flight"] == 1
    unloaded = server.ask("DELETE", ADAPTER, params={"timeout_seconds": 30})
    assert unloaded["in_flight"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_before_an_answer_frees_the_adapter(server: Served, stream: bool) -> None:
    body = {**WORDS, "model": "pirate", "logit_bias": NO_END, "max_tokens": ENDLESS_TOKENS, "stream": stream}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        until(lambda: server.adapters()["pirate"]["in_flight"] == 1)
    unloaded = server.ask("DELETE", ADAPTER, params={"timeout_seconds": 30})
    assert unloaded["in_flight"] == 0
    assert unloaded["requests"] == 1

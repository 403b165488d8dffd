"""Adapters are changed while answers are streamed, and clients leave: the streams go on unharmed.

A stream here is greedy and may not end by itself, so that it is as long as the test wants; it is compared
with what the same adapter says when nothing else goes on.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from openai import OpenAI

from tests.e2e.running import BASE, DEMO_ADAPTERS, Served, error_of

QUESTION = "Tell me something about cats."
LONG_TOKENS = 72
ENDLESS_TOKENS = 8000
NO_END = {"0": -100, "2": -100}
"""A bias against the tokens that end an answer."""
ADAPTER = "/v1/adapters/pirate"


@pytest.fixture
def server(own_process: Served, adapters_root: Path) -> Served:
    """Only the pirate is loaded, as the demo has it; the folders are the demo's."""
    shutil.rmtree(adapters_root)
    shutil.copytree(DEMO_ADAPTERS, adapters_root)
    for name in own_process.adapters():
        own_process.ask("DELETE", f"/v1/adapters/{name}")
    own_process.ask("POST", "/v1/adapters", 201, json={"id": "pirate"})
    return own_process


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


class Stream:
    """An answer under way, of which the first words have come."""

    def __init__(self, client: OpenAI, model: str, question: str, tokens: int) -> None:
        self.chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=tokens,
            logit_bias=NO_END,
            stream=True,
        )
        self.text = ""
        self.reason: str | None = None
        self.more()

    def more(self) -> None:
        """Wait for some more text: the stream goes on."""
        before = self.text
        for chunk in self.chunks:
            choice = chunk.choices[0]
            self.text += choice.delta.content or ""
            self.reason = choice.finish_reason
            if self.text != before:
                return
        raise AssertionError(f"expected the stream to go on, but it ended after {before!r}")

    def rest(self) -> str:
        """The whole text, once the stream has ended as it should."""
        for chunk in self.chunks:
            choice = chunk.choices[0]
            self.text += choice.delta.content or ""
            self.reason = choice.finish_reason
        assert self.reason == "length"
        return self.text


@contextmanager
def streaming(
    client: OpenAI, model: str = "pirate", question: str = QUESTION, tokens: int = LONG_TOKENS
) -> Iterator[Stream]:
    stream = Stream(client, model, question, tokens)
    try:
        yield stream
    finally:
        stream.chunks.close()


def say(client: OpenAI, model: str, tokens: int = 12) -> tuple[str, int]:
    """A short answer to the question, and how many tokens of the prompt were cached."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=tokens
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens_details.cached_tokens or 0


def until(what: Callable[[], bool]) -> None:
    """Ask the server again and again until it is so; HTTP has no way to be told."""
    ends = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends, "expected it to become so within 60 s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(own_process: Served) -> str:
    """What the pirate says when nothing else goes on."""
    if "pirate" not in own_process.adapters():
        own_process.ask("POST", "/v1/adapters", 201, json={"id": "pirate"})
    with own_process.openai() as client, streaming(client) as stream:
        return stream.rest()


# Changes


def test_a_stream_ends_on_the_weights_that_it_began_with(
    alone: str, server: Served, client: OpenAI, adapters_root: Path
) -> None:
    with streaming(client) as stream:
        server.ask("POST", "/v1/adapters", 201, json={"id": "json"})
        stream.more()
        server.ask("PUT", "/v1/adapters/active", json={"id": "json"})
        stream.more()

        shutil.copytree(DEMO_ADAPTERS / "shakespeare", adapters_root / "pirate", dirs_exist_ok=True)
        replaced = server.ask("POST", "/v1/adapters", 200, json={"id": "pirate", "replace": True})
        assert (replaced["version"], replaced["type"], replaced["in_flight"]) == (2, "dora", 1)
        stream.more()

        new, cached = say(client, "pirate")
        assert cached == 0, "caches of version 1 were used for version 2"
        server.ask("POST", "/v1/adapters", 201, json={"id": "shakespeare"})
        assert new == say(client, "shakespeare")[0]
        assert not alone.startswith(new)
        stream.more()

        swapped = server.ask("PUT", "/v1/adapters/active", json={"id": None, "unload_previous": True})
        assert (swapped["active"], swapped["previous"]) == (None, "json")
        assert "json" not in server.adapters()
        server.ask("DELETE", "/v1/adapters/shakespeare")
        stream.more()
        assert server.adapters()["pirate"]["in_flight"] == 1
        assert stream.rest() == alone

    until(lambda: server.adapters()["pirate"]["in_flight"] == 0)
    # The stream left its caches behind, of the same prompt: they are version 1's alone.
    assert say(client, "pirate")[0] == new

    shutil.copytree(DEMO_ADAPTERS / "pirate", adapters_root / "pirate", dirs_exist_ok=True)
    third = server.ask("POST", "/v1/adapters", 200, json={"id": "pirate", "replace": True})
    assert (third["version"], third["type"]) == (3, "lora")
    assert alone.startswith(say(client, "pirate")[0])


def test_what_is_unloaded_is_gone_for_others_at_once_and_stays_for_its_stream(
    alone: str, server: Served, client: OpenAI
) -> None:
    with streaming(client) as stream, ThreadPoolExecutor(1) as pool:
        unload = pool.submit(server.ask, "DELETE", ADAPTER, params={"timeout_seconds": 120})
        until(lambda: server.adapters()["pirate"]["state"] == "draining")
        body = {"model": "pirate", "messages": [{"role": "user", "content": QUESTION}]}
        refused = server.ask("POST", "/v1/chat/completions", 404, json=body)
        assert error_of(refused)["code"] == "model_not_found"
        assert not unload.done()
        stream.more()
        assert stream.rest() == alone
        unloaded = unload.result()
    assert unloaded["in_flight"] == 0
    assert unloaded["freed_bytes"] > 0
    assert error_of(server.ask("GET", ADAPTER, 404))["code"] == "adapter_not_found"
    # Unloaded by a call, it does not come back by itself.
    assert error_of(server.ask("POST", "/v1/chat/completions", 404, json=body))["code"] == "model_not_found"


def test_a_busy_adapter_is_ready_again_when_the_time_is_up(server: Served, client: OpenAI) -> None:
    with streaming(client, tokens=ENDLESS_TOKENS) as stream:
        refused = error_of(server.ask("DELETE", ADAPTER, 409, params={"timeout_seconds": 0.2}))
        assert refused["code"] == "adapter_busy"
        adapter = server.adapters()["pirate"]
        assert (adapter["state"], adapter["in_flight"]) == ("ready", 1)
        assert say(client, "pirate", tokens=2)[0]
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
    shutil.rmtree(folder)
    folder.symlink_to(DEMO_ADAPTERS / "pirate")


BAD: dict[str, tuple[Callable[[Path], Any], int]] = {
    "truncated": (_truncate, 422),
    "empty": (lambda folder: (folder / "adapters.safetensors").write_bytes(b""), 422),
    "garbage": (lambda folder: (folder / "adapters.safetensors").write_bytes(b"\x07garbage" * 99), 422),
    "huge-header": (_huge_header, 422),
    "nan": (lambda folder: _with(folder, first=mx.full((576, 8), float("nan"))), 422),
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
    alone: str, server: Served, client: OpenAI, adapters_root: Path
) -> None:
    before = {name: _lasting(adapter) for name, adapter in server.adapters().items()}
    with streaming(client) as stream:
        for name, (spoil, status) in BAD.items():
            shutil.copytree(DEMO_ADAPTERS / "pirate", adapters_root / name)
            spoil(adapters_root / name)
            refused = error_of(server.ask("POST", "/v1/adapters", status, json={"id": name}))
            if status == 422:
                assert refused["code"] == "adapter_invalid", name
                assert refused["details"], name
                body = {"id": "pirate", "path": name, "replace": True}
                assert error_of(server.ask("POST", "/v1/adapters", 422, json=body)) == refused, name
        for adapter_id in ("../pirate", "a/b", BASE, "x" * 300, "a\nb", "default"):
            error_of(server.ask("POST", "/v1/adapters", 400, json={"id": adapter_id}))
        error_of(server.ask("POST", "/v1/adapters", 403, json={"id": "other", "path": "../../etc"}))
        error_of(server.ask("POST", "/v1/adapters", 409, json={"id": "pirate"}))
        assert {name: _lasting(adapter) for name, adapter in server.adapters().items()} == before
        stream.more()
        assert stream.rest() == alone


def _lasting(adapter: dict[str, Any]) -> dict[str, Any]:
    """What requests do not change."""
    return {name: adapter[name] for name in ("id", "digest", "version", "state", "type", "path", "active")}


# Clients that leave


def test_who_closes_a_stream_frees_the_adapter(server: Served, client: OpenAI) -> None:
    with streaming(client, tokens=ENDLESS_TOKENS):
        assert server.adapters()["pirate"]["in_flight"] == 1
    unloaded = server.ask("DELETE", ADAPTER, params={"timeout_seconds": 30})
    assert unloaded["in_flight"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_before_an_answer_frees_the_adapter(server: Served, stream: bool) -> None:
    body = {"model": "pirate", "messages": [{"role": "user", "content": QUESTION}], "logit_bias": NO_END}
    body |= {"max_tokens": ENDLESS_TOKENS, "stream": stream}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        until(lambda: server.adapters()["pirate"]["in_flight"] == 1)
    unloaded = server.ask("DELETE", ADAPTER, params={"timeout_seconds": 30})
    assert unloaded["in_flight"] == 0
    assert unloaded["requests"] == 1

"""The command line against a running server, and how a server begins and ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import BASE, STOP_SECONDS, Done, Served, run, serving
from tests.e2e.streams import ENDLESS_TOKENS, NO_END, WORDS, Stream, write_long_model


def adapters(server: Served, *arguments: str) -> Any:
    """The JSON of `mlx-graft adapters …`, which must succeed and print nothing else."""
    done = run("adapters", *arguments, "--json", url=server.url)
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def chat(server: Served, *arguments: str, stdin: str = "") -> Done:
    return run("chat", *arguments, "--temperature", "0", "--max-tokens", "10", url=server.url, stdin=stdin)


def test_the_life_of_an_adapter(demo: Served) -> None:
    listed = adapters(demo, "list")
    assert listed == demo.ask("GET", "/v1/adapters")
    assert {"pirate", "shakespeare"} <= {adapter["id"] for adapter in listed["data"]}

    assert adapters(demo, "unload", "pirate", "--timeout", "20")["freed_bytes"] > 0
    gone = chat(demo, "--model", "pirate", "Hello!")
    assert (gone.code, gone.out) == (1, "")
    assert "'pirate'" in gone.err
    assert "Traceback" not in gone.err

    assert adapters(demo, "load", "pirate", "--pin")["pinned"] is True
    assert adapters(demo, "load", "pirate", "--replace")["version"] == 2
    assert adapters(demo, "swap", "pirate")["active"] == "pirate"
    assert demo.ask("GET", "/v1/adapters")["active"] == "pirate"
    swapped = adapters(demo, "swap", "--none")
    assert (swapped["active"], swapped["previous"]) == (None, "pirate")
    assert swapped["swap_seconds"] < 1


def test_fuse_and_unfuse(demo: Served) -> None:
    question = "What is the capital of Italy?"
    base, pirate = chat(demo, "--model", BASE, question), chat(demo, "--model", "pirate", question)
    assert base.out != pirate.out

    refused = run("adapters", "fuse", "pirate", "--json", url=demo.url)
    assert refused.code == 1
    assert json.loads(refused.out)["error"]["code"] == "adapters_loaded"
    assert refused.err.startswith("error: ")

    assert adapters(demo, "fuse", "pirate", "--unload-others")["modules"] > 0
    assert chat(demo, "--model", BASE, question).out == pirate.out
    assert adapters(demo, "unfuse", "pirate")["state"] == "ready"
    assert chat(demo, "--model", BASE, question).out == base.out


def test_tables_for_people(demo: Served) -> None:
    done = run("adapters", "list", url=demo.url)
    assert (done.code, done.err) == (0, "")
    rows = {line.split()[0] for line in done.out.splitlines() if line}
    assert set(demo.adapters()) < rows


def test_a_question_as_an_argument_and_through_a_pipe(demo: Served) -> None:
    question = "What do cows eat?"
    asked = chat(demo, "--model", "pirate", question)
    assert (asked.code, asked.err) == (0, "")
    answer = demo.ask(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "pirate",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 10,
        },
    )
    assert asked.out == answer["choices"][0]["message"]["content"] + "\n"
    assert chat(demo, "--model", "pirate", stdin=question + "\n").out == asked.out


def test_a_second_server_on_the_same_port_is_refused_with_a_sentence(demo: Served) -> None:
    done = run("demo", "--port", demo.port)
    assert (done.code, done.out) == (1, "")
    assert f"error: port {demo.port} of 127.0.0.1 is in use" in done.err
    assert "Traceback" not in done.err
    assert demo.ask("GET", "/ready") == {"status": "ready"}


@pytest.fixture(scope="module")
def long_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_model(tmp_path_factory.mktemp("models") / "tiny")


def test_ctrl_c_ends_a_server_after_what_it_is_about(long_model_path: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors.log"
    with serving(errors, "serve", str(long_model_path), "--shutdown-timeout-seconds", "60") as server:
        stream = Stream(server, "tiny", tokens=400)
        server.process.send_signal(signal.SIGINT)
        assert len(stream.rest()) == 400
        server.http.close()
        assert server.process.wait(STOP_SECONDS) in (0, 130)
    said = errors.read_text()
    assert "Stopping" in said
    assert "Traceback" not in said
    assert "terminate called" not in said


def test_a_stream_that_outlasts_the_stop_is_told_so(long_model_path: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors.log"
    body = {**WORDS, "max_tokens": ENDLESS_TOKENS, "logit_bias": NO_END, "stream": True}
    with (
        serving(errors, "serve", str(long_model_path), "--shutdown-timeout-seconds", "1") as server,
        server.http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        server.process.send_signal(signal.SIGINT)
        *_, last = lines
        told = json.loads(last.removeprefix("data: "))
        assert told["error"]["code"] == "server_stopping"
        server.http.close()
        assert server.process.wait(STOP_SECONDS) in (0, 130)
    assert "Traceback" not in errors.read_text()

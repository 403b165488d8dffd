"""What the README shows, word for word and in its order, against the real demo at another port."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from adapters_core import AdapterContainer
from tests.e2e.running import BASE, DEMO_ADAPTERS, ROOT, Served, environment

WEEK = "How many days are there in a week?"
FIRST_TOKENS = 8
"""Of the 40 that the README asks for: enough to know whose answer it is."""
PIRATE = re.compile(r"\barr\b|matey", re.IGNORECASE)


def blocks(language: str) -> list[str]:
    """The README's blocks of code in a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[str]:
    """The commands of a block; one goes on where a quotation does."""
    lines: list[str] = []
    for line in block.splitlines():
        if not lines and (not line.strip() or line.startswith("#")):
            continue
        lines.append(line)
        command = "\n".join(lines)
        try:
            shlex.split(command, comments=True)
        except ValueError:
            continue
        yield command
        lines = []
    assert not lines, f"a quotation has no end: {lines}"


class Reader:
    """Somebody who follows the README in a terminal, beside the demo."""

    def __init__(self, server: Served, home: Path) -> None:
        self.server = server
        self.home = home
        program = home / ".venv" / "bin" / "mlx-graft"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m server "$@"\n')
        program.chmod(0o755)
        # curl tells each status, which a command that is copied does not ask for.
        (home / ".curlrc").write_text('write-out = "%{stderr}%{http_code}"\n')

    def shell(self, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        variables = {
            "CURL_HOME": str(self.home),
            "GRAFT_URL": self.server.url,
            "NO_PROXY": "*",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["bash", "-euc", command.replace("localhost:8000", f"localhost:{self.server.port}")],
            cwd=self.home,
            env=environment(**variables),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def curl(self, command: str) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        done = self.shell(command)
        return int(done.stderr), json.loads(done.stdout)

    def python(self, code: str) -> str:
        """What a program prints."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.home,
            env=environment(PYTHONPATH=str(ROOT), NO_PROXY="*"),
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def says(self, model: str, question: str = WEEK) -> str:
        """The first words of what the server answers to a request that the README does not have."""
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "temperature": 0, "max_tokens": FIRST_TOKENS, "messages": messages}
        return said(self.server.ask("POST", "/v1/chat/completions", json=body))

    def is_gone(self, model: str) -> bool:
        reply = self.server.http.post(
            "/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1}
        )
        return reply.status_code == 404


def said(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.fixture
def reader(demo: Served, tmp_path: Path) -> Reader:
    return Reader(demo, tmp_path)


def test_the_sessions_in_their_order(reader: Reader) -> None:
    curls = [command for block in blocks("bash") for command in commands(block) if "curl" in command]
    answers = _follow(reader, curls)
    base, pirate = said(answers[0]), said(answers[1])
    assert base != pirate
    assert PIRATE.search(pirate)
    assert not PIRATE.search(base)

    (session,) = [block for block in blocks("python") if "openai" in block]
    printed = reader.python(session.replace("http://127.0.0.1:8000", reader.server.url))
    question = "Where does the sun rise?"
    for model in (BASE, "pirate", "shakespeare"):
        assert f"{model}: {reader.says(model, question)}" in printed
    (whole,) = re.findall(r"^pirate: (.*?)\nshakespeare: ", printed, re.MULTILINE | re.DOTALL)
    assert printed.endswith(f"\n{whole}"), "streamed as in one piece"

    (block,) = [block for block in blocks("bash") if "mlx-graft adapters" in block]
    _type(reader, list(commands(block)), pirate)


def _follow(reader: Reader, curls: list[str]) -> list[Any]:
    """The answers to the README's calls, each of which does what the README says."""
    base = reader.says(BASE)

    def unloaded(answer: Any) -> None:
        assert answer["freed_bytes"] > 0
        assert reader.is_gone("pirate")

    def loaded(answer: Any) -> None:
        assert (answer["version"], answer["state"]) == (1, "ready")
        assert PIRATE.search(reader.says("pirate"))

    def swapped_back(answer: Any) -> None:
        assert (answer["active"], answer["previous"]) == (None, "shakespeare")
        assert reader.says("default") == base

    def fused(answer: Any) -> None:
        assert answer["modules"] > 0
        assert PIRATE.search(reader.says(BASE))

    def unfused(answer: Any) -> None:
        assert answer["state"] == "ready"
        assert reader.says(BASE) == base

    steps: list[tuple[str, int, Callable[[Any], Any]]] = [
        (f'"model": "{BASE}"', 200, lambda answer: said(answer).startswith(base)),
        ('"model": "pirate"', 200, lambda answer: answer["model"] == "pirate"),
        (r"curl -s localhost:8000/v1/adapters$", 200, lambda answer: "pirate" in str(answer["data"])),
        (r"-X DELETE 'localhost:8000/v1/adapters/pirate\?", 200, unloaded),
        (r'\{"id": "pirate"\}', 201, loaded),
        (r'"replace": true', 200, lambda answer: answer["version"] == 2),
        (r'-X PUT .*"id": "shakespeare"', 200, lambda answer: answer["active"] == "shakespeare"),
        (r"What do cows eat", 200, lambda answer: answer["model"] == "shakespeare"),
        (r'-X PUT .*"id": null', 200, swapped_back),
        (
            r'"adapters": \[',
            200,
            lambda answer: not said(answer).startswith(reader.says(BASE, "Where does the sun rise?")),
        ),
        (r"adapters/pirate/fuse .*unload_others", 200, fused),
        (r"-X DELETE localhost:8000/v1/adapters/pirate/fuse$", 200, unfused),
        (r'\{"id": "shakespeare"\}', 201, lambda answer: answer["state"] == "ready"),
    ]
    assert len(curls) == len(steps)
    answers = []
    for command, (pattern, expected, check) in zip(curls, steps, strict=True):
        assert re.search(pattern, command), f"expected {pattern} in {command}"
        status, answer = reader.curl(command)
        assert (status, "error" in answer) == (expected, False), answer
        assert check(answer) is not False, f"{command}\n{answer}"
        answers.append(answer)
    return answers


def _type(reader: Reader, typed: list[str], pirate: str) -> None:
    """The commands of `mlx-graft`, each of which does what the README says."""
    steps: list[tuple[str, Callable[[str], bool]]] = [
        ("adapters list", lambda out: "pirate" in out),
        ("adapters swap pirate", lambda out: pirate.startswith(reader.says("default"))),
        ("adapters fuse pirate --unload-others", lambda out: pirate.startswith(reader.says(BASE))),
        ("adapters unfuse pirate", lambda out: not pirate.startswith(reader.says(BASE))),
        ("chat --model pirate ", lambda out: bool(out.strip())),  # at random: no temperature is given
        ("chat ", lambda out: bool(out.strip())),
    ]
    assert len(typed) == len(steps)
    for command, (words, check) in zip(typed, steps, strict=True):
        assert command.startswith(f".venv/bin/mlx-graft {words}"), command
        done = reader.shell(command, stdin="What do cows eat?\n")
        assert done.stderr == ""
        assert check(done.stdout), f"{command}\n{done.stdout}"


def test_the_library_example(demo_model_path: Path, reader: Reader) -> None:
    (example,) = [block for block in blocks("python") if "adapters_core" in block]
    hub_id = "mlx-community/Llama-3.2-3B-Instruct-4bit"
    assert f'mlx_lm.load("{hub_id}")' in example
    shutil.copytree(DEMO_ADAPTERS / "pirate", reader.home / "adapters" / "pirate")
    printed = reader.python(example.replace(hub_id, str(demo_model_path)))
    assert "FuseReport(modules=60" in printed
    adapter = AdapterContainer.from_directory(reader.home / "adapters" / "new")
    assert adapter.config.lora_parameters.rank == 8
    assert mlx_lm.load(str(demo_model_path), adapter_path=str(reader.home / "adapters" / "new"))

"""`mlx-graft serve` with a real model that computes next to nothing: start, use, and every way to stop."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
from mlx_lm.utils import save_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import adapter_tensors, adapter_values, tiny_llama, write_adapter

from .conftest import Program, environment

END = 256


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model over bytes, and so many positions that an answer never ends by itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    model = tiny_llama(vocab_size=END + 1, max_position_embeddings=10**6)
    save_model(folder, model)
    config = {name: value for name, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@dataclass
class Serving:
    """A server as a process, and where it is."""

    process: subprocess.Popen[str]
    base: str = ""
    url: str = ""

    def stop(self, *signals: signal.Signals) -> tuple[int, str]:
        """Send signals; the exit code and what was written to standard error."""
        for each in signals:
            self.process.send_signal(each)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


Serve = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, ready: bool = True) -> Serving:
        command = [sys.executable, "-m", "server", *arguments, "--port", "0"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        started.append(process)
        if not ready:
            return Serving(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"Serving (\S+) on (http://127\.0\.0\.1:\d+)[. ]", line)
        assert found is not None, line or process.communicate()[1]
        return Serving(process, found[1], found[2])

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def endless(url: str) -> Any:
    """A streamed answer that goes on until it is cut off."""
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "max_tokens": 100_000,
        "temperature": 0,
        "logit_bias": {str(END): -100},
    }
    return httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def test_a_server_is_used_and_stops_within_its_time(
    serve: Serve, command: Program, model_path: Path, tmp_path: Path
) -> None:
    values = adapter_values()
    write_adapter(tmp_path / "pirate", values, adapter_tensors(tiny_llama(), values))
    serving = serve(
        "serve", str(model_path), "--adapters-dir", str(tmp_path), "--shutdown-timeout-seconds", "1"
    )
    url = serving.url
    assert serving.base == "tiny"
    assert "Not loaded: pirate." in command("adapters", "list", "--url", url).out
    assert command("adapters", "load", "pirate", "--activate", "--url", url).out.startswith(
        "Loaded pirate: lora"
    )
    assert "Active: pirate." in command("adapters", "list", "--url", url).out
    assert command("adapters", "swap", "--none", "--url", url).out.startswith("Active: none (before: pirate)")
    assert command("adapters", "unload", "pirate", "--url", url).out.startswith("Unloaded pirate. Freed ")
    missing = command("adapters", "unload", "pirate", "--url", url)
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert command("chat", "Hello", "--model", "tiny", "--max-tokens", "3", "--url", url).code == 0
    with endless(url) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        code, err = serving.stop(signal.SIGINT)
    assert code == 0
    assert "Stopping: requests in flight have 1 s to finish" in err
    assert "Traceback" not in err
    assert '"path": "/v1/adapters"' in err, "requests are logged"


def test_terminate_is_graceful_too(serve: Serve, model_path: Path) -> None:
    code, err = serve("serve", str(model_path)).stop(signal.SIGTERM)
    assert (code, "Traceback" in err) == (0, False)


def test_a_second_interrupt_stops_at_once(serve: Serve, model_path: Path) -> None:
    serving = serve("serve", str(model_path), "--shutdown-timeout-seconds", "3600")
    with endless(serving.url) as answer:
        lines = answer.iter_lines()  # whoever lets go of it hangs up
        assert next(lines).startswith("data:")
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.stderr is not None
        for line in serving.process.stderr:
            if "Stopping: " in line:
                break
        code, _ = serving.stop(signal.SIGINT)
    assert code == 130


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_start_can_be_interrupted(
    serve: Serve, model_path: Path, tmp_path: Path, sent: signal.Signals, expected: int
) -> None:
    slow = tmp_path / "tiny"
    slow.mkdir()
    os.mkfifo(slow / "config.json")
    serving = serve("serve", str(slow), ready=False)
    with (slow / "config.json").open("w"):  # opens once the server reads it, which it then does for ever
        code, err = serving.stop(sent)
    assert (code, "Traceback" in err) == (expected, False)


def test_the_demo_serves_its_adapters_and_shows_calls_that_work(serve: Serve) -> None:
    serving = serve("demo")
    assert serving.process.stdout is not None
    ask, look, talk = (shlex.split(call) for call in read_welcome(serving.process.stdout))
    listing = httpx.get(look[1], trust_env=False).json()
    loaded = {adapter["id"] for adapter in listing["data"]}
    assert len(loaded) >= 4
    assert listing["available"] == []
    body = json.loads(ask[ask.index("-d") + 1])
    assert body["model"] in loaded
    assert talk[talk.index("--model") + 1] in loaded
    reply = httpx.post(ask[1], json={**body, "max_tokens": 8}, timeout=60, trust_env=False)
    assert reply.status_code == 200
    assert reply.json()["model"].endswith(body["model"])
    assert serving.stop(signal.SIGINT)[0] == 0


def read_welcome(stdout: IO[str]) -> list[str]:
    """The three commands that are shown, each on one line."""
    commands: list[str] = []
    begun = ""
    for line in stdout:
        if not line.startswith("  "):
            continue
        begun += line.removesuffix("\n").removesuffix("\\")
        if not line.endswith("\\\n"):
            commands.append(begun)
            begun = ""
        if len(commands) == 3:
            break
    return commands

"""`mlx-graft chat` against a small real server: one question, a pipe, a conversation on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from .conftest import CannedServer, Program, environment


def test_one_question(command: Program, canned: CannedServer) -> None:
    done = command("chat", "Hello", "--url", canned.url, "--model", "pirate", "--system", "Be brief.")
    assert (done.code, done.err) == (0, "")
    assert done.out == "Arr, 1\né\\x1b[31m\n", "as the model said it, but for what would drive the terminal"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = {"model": "pirate", "messages": messages, "stream": True}
    assert canned.requests == [("POST", "/v1/chat/completions", expected)]


def test_a_question_from_a_pipe(command: Program, canned: CannedServer) -> None:
    done = command(
        "chat", "--url", canned.url, "--max-tokens", "5", "--temperature", "0", stdin="Hi\nthere\n"
    )
    assert done.code == 0
    body = canned.requests[0][2]
    assert body["messages"] == [{"role": "user", "content": "Hi\nthere"}]
    assert (body["max_tokens"], body["temperature"]) == (5, 0)
    assert "model" not in body, "the active adapter answers"


def test_an_empty_pipe_is_no_question(command: Program, canned: CannedServer) -> None:
    done = command("chat", "--url", canned.url, stdin=" \n")
    assert (done.code, canned.requests) == (2, [])


@pytest.mark.parametrize(
    ("model", "shown", "sentence"),
    [
        ("missing", "", "The model 'missing' does not exist; served are tiny, pirate."),
        ("failing", "Arr, 1\né\\x1b[31m\n", "The model was unloaded."),
        ("cut", "Arr, 1\né\\x1b[31m\n", "closed the connection before the answer was complete."),
    ],
)
def test_what_goes_wrong_is_a_sentence(
    command: Program, canned: CannedServer, model: str, shown: str, sentence: str
) -> None:
    done = command("chat", "Hello", "--url", canned.url, "--model", model)
    assert (done.code, done.out) == (1, shown)
    assert done.err.startswith("error: ")
    assert done.err.endswith(f"{sentence}\n")


Talk = Callable[..., str]


@pytest.fixture
def talk(canned: CannedServer) -> Iterator[Talk]:
    """Types lines on a terminal, each once the prompt is there; gives back what the terminal shows."""
    running: list[subprocess.Popen[bytes]] = []

    def run(*lines: str) -> str:
        outer, inner = pty.openpty()
        command = [sys.executable, "-m", "server", "chat", "--url", canned.url]
        process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment())
        running.append(process)
        os.close(inner)
        shown = ""
        for line in lines:
            shown += read_until(outer, "> ")
            os.write(outer, line.encode() + b"\n")
        shown += read_until(outer, None)
        os.close(outer)
        assert process.wait(30) == 0
        return shown.replace("\r\n", "\n")

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def read_until(terminal: int, end: str | None) -> str:
    """What comes until it ends with `end`, or until the terminal's other side is closed."""
    shown = b""
    while end is None or not shown.endswith(end.encode()):
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux' way to say that the other side is closed
            break
        if not piece:
            break
        shown += piece
    return shown.decode()


def test_a_conversation_keeps_what_was_said(talk: Talk, canned: CannedServer) -> None:
    shown = talk("One", "Two", "/model missing", "Three", "/model pirate", "Four", "/reset", "Five", "/quit")
    assert "Arr, 1" in shown
    assert "Arr, 2" in shown
    assert "error: The model 'missing' does not exist" in shown
    assert "Arr, 3" in shown, "the turn that failed is not part of the conversation"
    asked = [body for method, _, body in canned.requests if method == "POST"]
    assert [body.get("model") for body in asked] == [None, None, "missing", "pirate", "pirate"]
    assert [message["content"] for message in asked[1]["messages"]] == ["One", "Arr, 1\né\x1b[31m", "Two"]
    assert [message["content"] for message in asked[4]["messages"]] == ["Five"]


def test_models_and_help_and_the_end_of_input(talk: Talk, canned: CannedServer) -> None:
    shown = talk("/models", "/what", "", "\x04")
    assert "tiny\npirate\n" in shown
    assert shown.count("/reset forgets the conversation") == 2
    assert [method for method, _, _ in canned.requests] == ["GET"]

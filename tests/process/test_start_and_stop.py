"""Signals, limits and logs of a start and of a stop, as a supervisor or a shell sees them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ROOT, command, environment, error_of, serving, until
from tests.e2e.streams import NO_END, WORDS

from .sockets import CHAT, file_limits, open_files

LONG = {**WORDS, "max_tokens": 60_000, "logit_bias": NO_END}


def begin(
    *arguments: str, before: Callable[[], None] | None = None, **variables: str
) -> subprocess.Popen[str]:
    """`mlx-graft` with these arguments; `before` is called in the new process."""
    return subprocess.Popen(
        command(*arguments, "--port", "0"),
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def limit_files(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_64_descriptors_are_too_few_and_a_sentence_says_so(model_path: Path) -> None:
    out, err = begin("serve", str(model_path), before=limit_files(64, 64)).communicate(timeout=60)
    assert out == ""
    assert re.fullmatch(r"error: expected a limit of at least \d+ open files, but it is 64: .*\n", err), err


@pytest.mark.parametrize(("soft", "expected"), [(3000, (3000, 3500)), (256, (2144, 3500))])
def test_the_limit_of_open_files_is_the_operators(
    model_path: Path, soft: int, expected: tuple[int, int]
) -> None:
    with begin("serve", str(model_path), before=limit_files(soft, 3500)) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith("Serving tiny on "), serving.communicate()[1]
        assert file_limits(serving.pid) == expected
        assert open_files(serving.pid) < 64
        serving.terminate()
        serving.communicate(timeout=60)


@pytest.mark.parametrize(("limit", "shared"), [(2200, (1024, 275)), (1024, (800, 128)), (200, (79, 25))])
def test_descriptors_are_shared_out(limit: int, shared: tuple[int, int]) -> None:
    code = "from server.descriptors import share_descriptors as share; print(share(1024))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit_files(limit, limit),
    )
    connections, backlog = shared
    assert done.stdout == f"Descriptors(connections={connections}, backlog={backlog})\n"


def test_an_interrupt_of_imports_ends_the_start_without_a_word(model_path: Path, tmp_path: Path) -> None:
    """`typer` is what `mlx-graft` imports first; here it waits until somebody writes, which nobody does."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "typer.py").write_text(f"open({str(pipe)!r}).read()\n")
    starting = begin("serve", str(model_path), PYTHONPATH=str(tmp_path))
    with pipe.open("w"):  # opens once it is being read
        starting.send_signal(signal.SIGINT)
        assert starting.communicate(timeout=60) == ("", "")
    assert starting.returncode == 130


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_answers_what_it_does_not_finish(
    model_path: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    errors = tmp_path / "errors.log"
    replies: dict[str, Any] = {}
    with serving(errors, "serve", str(model_path), "--shutdown-timeout-seconds", "1") as served:
        whole = threading.Thread(
            target=lambda: replies.update(whole=served.http.post(CHAT, json=LONG)), daemon=True
        )
        with served.http.stream("POST", CHAT, json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            whole.start()
            until(lambda: "graft_running_requests 2.0" in served.http.get("/metrics").text)
            served.process.send_signal(sent)
            last = [line for line in lines if line.startswith("data: ")][-1]
        whole.join(60)
        code = served.process.wait(60)
    assert code == 0
    assert error_of(json.loads(last.removeprefix("data: ")))["code"] == "server_stopping"
    assert replies["whole"].status_code == 503
    assert error_of(replies["whole"].json())["code"] == "server_stopping"
    assert int(replies["whole"].headers["retry-after"]) > 1
    text = errors.read_text()
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if not is_json(line)] == []
    assert "Loading tiny" in text
    assert "Stopping: requests in flight have 1 s" in text


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_hanging_up_is_ignored_under_nohup(model_path: Path, tmp_path: Path) -> None:
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the server inherits
    try:
        with serving(tmp_path / "errors.log", "serve", str(model_path)) as served:
            served.process.send_signal(signal.SIGHUP)
            assert served.ask("GET", "/health") == {"status": "ok"}
            assert served.ask("GET", "/ready") == {"status": "ready"}
    finally:
        signal.signal(signal.SIGHUP, kept)

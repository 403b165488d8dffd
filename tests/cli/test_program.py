"""The program as a process: help, versions, wrong settings, and what it imports."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli.configuration import flag_of
from server.settings import Settings

from .conftest import Program, environment


def test_help_names_every_command(program: Program) -> None:
    done = program("--help")
    assert (done.code, done.err) == (0, "")
    for command in ("serve", "demo", "adapters", "chat", "version"):
        assert f" {command} " in done.out


def test_without_a_command_the_help_is_shown(program: Program) -> None:
    done = program()
    assert done.code == 2
    assert "Usage: mlx-graft" in done.out + done.err


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_server_has_a_flag_for_every_setting(program: Program, command: str) -> None:
    from server.cli.demo import DEMO_FIXES

    done = program(command, "--help")
    assert done.code == 0
    left_out = DEMO_FIXES if command == "demo" else {"model"}
    names = set(Settings.model_fields) - left_out
    assert [name for name in names if flag_of(name) not in done.out] == []


@pytest.mark.parametrize("arguments", [("--version",), ("version",)])
def test_version(program: Program, arguments: tuple[str, ...]) -> None:
    done = program(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("mlx-graft ")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["adapters", "list"], ["chat", "Hello"], ["serve", "--help"]]
)
def test_commands_that_compute_nothing_import_no_mlx(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from server.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'fastapi'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    env = environment(GRAFT_URL="http://127.0.0.1:1")
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0


def test_wrong_settings_are_sentences_and_exit_code_2(program: Program) -> None:
    done = program("serve", "model", "--port", "x", "--max-n", "0", GRAFT_PROT="1")
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") and line.endswith((".", "?")) for line in lines)


def test_an_unknown_flag_is_named(program: Program) -> None:
    done = program("serve", "model", "--prot", "1")
    assert done.code == 2
    assert "--prot" in done.err


def test_another_address_without_a_key_is_refused(program: Program) -> None:
    done = program("serve", "model", "--host", "0.0.0.0")
    assert done.code == 2
    assert "GRAFT_API_KEY" in done.err


def test_a_port_in_use_is_a_sentence(program: Program) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = program("serve", "model", "--port", str(port))
    assert (done.code, done.out) == (1, "")
    assert f"error: port {port} of 127.0.0.1 is in use" in done.err


def test_an_address_of_another_machine_is_a_sentence(program: Program) -> None:
    done = program("serve", "model", "--host", "192.0.2.1", GRAFT_API_KEY="k")
    assert done.code == 1
    assert "'192.0.2.1'" in done.err


@pytest.mark.parametrize("content", [None, "not JSON"])
def test_what_is_no_model_is_a_sentence(program: Program, tmp_path: Path, content: str | None) -> None:
    model = tmp_path / "model"
    if content is not None:
        model.mkdir()
        (model / "config.json").write_text(content)
    done = program("serve", str(model), "--port", "0", "--log-level", "warning")
    assert (done.code, done.out) == (1, "")
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert str(model) in sentence

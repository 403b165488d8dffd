"""`mlx-graft adapters save …` against a small real server: what it asks for, and what it shows."""

from __future__ import annotations

import pytest

from .conftest import CannedServer, Program


def test_a_save_is_one_call_and_a_sentence(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "save", "mix", "kept", "--url", canned.url)
    assert canned.requests == [("POST", "/v1/adapters/mix/save", {"save_to": "kept"})]
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        "Saved mix, version 3, as the folder kept in the format mlx: 60 modules, 1.8 MiB.\n"
        "Ranks differ (4, 8): zeros fill factors up to 8.\n"
    )


def test_the_format_and_the_version(command: Program, canned: CannedServer) -> None:
    options = ["--format", "peft", "--version", "2"]
    done = command("adapters", "save", "mix", "kept", *options, "--url", canned.url)
    body = {"save_to": "kept", "format": "peft", "version": 2}
    assert canned.requests == [("POST", "/v1/adapters/mix/save", body)]
    assert done.out == "Saved mix, version 2, as the folder kept in the format peft: 60 modules, 1.8 MiB.\n"
    assert command("adapters", "save", "mix@2", "kept", "--url", canned.url).code == 0
    assert canned.requests[1:] == [("POST", "/v1/adapters/mix@2/save", {"save_to": "kept"})]


@pytest.mark.parametrize(
    "arguments", [["mix"], ["mix", "x", "--format", "gguf"], ["mix", "x", "--version", "0"]]
)
def test_wrong_arguments_ask_nothing(command: Program, canned: CannedServer, arguments: list[str]) -> None:
    done = command("adapters", "save", *arguments, "--url", canned.url)
    assert (done.code, canned.requests) == (2, [])

"""`mlx-graft adapters …` against a small real server: what it asks for, and what it shows."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from .conftest import ADAPTER, KEY, CannedServer, Program

CALLS: list[tuple[list[str], tuple[str, str, Any], str]] = [
    (
        ["load", "pirate"],
        ("POST", "/v1/adapters", {"id": "pirate"}),
        "Loaded pirate: lora, rank 8, scale 20,",
    ),
    (
        ["load", "p", "--path", "a/b", "--pin", "--activate", "--replace"],
        (
            "POST",
            "/v1/adapters",
            {"id": "p", "path": "a/b", "pinned": True, "activate": True, "replace": True},
        ),
        "1.8 MiB, version 1.",
    ),
    (["unload", "pirate"], ("DELETE", "/v1/adapters/pirate", None), "Unloaded pirate. Freed 1.8 MiB."),
    (["unload", "twin"], ("DELETE", "/v1/adapters/twin", None), "Unloaded twin.\n"),
    (
        ["unload", "a/b ?", "--timeout", "1.5"],
        ("DELETE", "/v1/adapters/a%2Fb%20%3F?timeout_seconds=1.5", None),
        "",
    ),
    (
        ["rollback", "pirate"],
        ("POST", "/v1/adapters/pirate/rollback", None),
        "Rolled pirate back: lora, rank 8",
    ),
    (
        ["swap", "haiku"],
        ("PUT", "/v1/adapters/active", {"id": "haiku"}),
        "Active: haiku (before: pirate), in 0.25 ms.",
    ),
    (
        ["swap", "--none", "--unload-previous"],
        ("PUT", "/v1/adapters/active", {"id": None, "unload_previous": True}),
        "Active: none (before: pirate)",
    ),
    (["fuse", "pirate"], ("POST", "/v1/adapters/pirate/fuse", {}), "Fused pirate into the resident base."),
    (
        ["fuse", "pirate", "--precision", "dense", "--unload-others", "--save-to", "new"],
        (
            "POST",
            "/v1/adapters/pirate/fuse",
            {"precision": "dense", "unload_others": True, "save_to": "new"},
        ),
        "dense 60",
    ),
    (["unfuse", "pirate"], ("DELETE", "/v1/adapters/pirate/fuse", None), "Unfused pirate"),
]


@pytest.mark.parametrize(("arguments", "request_made", "shown"), CALLS, ids=lambda value: str(value)[:24])
def test_each_command_makes_one_call(
    command: Program,
    canned: CannedServer,
    arguments: list[str],
    request_made: tuple[str, str, Any],
    shown: str,
) -> None:
    done = command("adapters", *arguments, "--url", canned.url)
    method, target, body = canned.requests[0]
    if "%2F" in request_made[1]:  # no route of the canned server has such an id, but the client asked for it
        assert (method, body, done.code) == ("DELETE", None, 1)
        assert target.endswith("?timeout_seconds=1.5")
        return
    assert canned.requests == [request_made]
    assert (done.code, done.err) == (0, "")
    assert shown in done.out


def test_list_is_a_table(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "list", GRAFT_URL=canned.url)
    assert (done.code, done.err) == (0, "")
    heading, first, second, active, available = done.out.splitlines()
    assert heading.split()[:3] == ["id", "type", "state"]
    assert first.split()[:4] == ["pirate", "lora", "ready,", "active"]
    assert second.split()[:4] == ["[bold]haiku", "lora", "ready,", "pinned"]
    assert "1.8 MiB" in first
    assert (active, available) == ("Active: pirate. Resident: 3.5 MiB of 1.0 GiB.", "Not loaded: sonnet.")


@pytest.mark.parametrize("url", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_any_form_of_the_address_will_do(command: Program, canned: CannedServer, url: str) -> None:
    assert command("adapters", "list", "--url", url.format(canned.url)).code == 0
    assert command("adapters", "list", "--url", url.format(canned.url).removeprefix("http://")).code == 0


def test_json_is_the_server_s_own_and_nothing_else(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "x", "--url", canned.url, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out == json.dumps({**ADAPTER, "id": "x"}, separators=(",", ":")) + "\n"


def test_a_load_tells_its_warnings(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "foreign", "--url", canned.url)
    assert (done.code, done.err) == (0, "warning: Another base.\n")
    assert done.out.startswith("Loaded foreign: lora,")


def test_what_a_report_has_no_value_for_is_left_out(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "fuse", "pirate", "--url", canned.url)
    assert "activations  error_worst 0, agreement 1\n" in done.out
    assert "worst" not in done.out.replace("error_worst", "")


def test_ranks_and_scales_that_differ_are_told_as_such(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "patterned", "--url", canned.url)
    assert done.out.startswith("Loaded patterned: lora, ranks 2-6, scales 1.5-11.31, 60 modules,")
    done = command("adapters", "load", "negative", "--url", canned.url)
    assert done.out.startswith("Loaded negative: lora, rank 2, scales -2 to 0.5, 60 modules,")


def test_an_error_is_one_sentence_with_its_details(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "broken", "--url", canned.url)
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "error: The adapter 'broken' cannot be used. tensor a is missing "
        "tensor b has shape (1, 2), expected (3, 4)\n"
    )


def test_an_error_says_what_to_do_here(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "loaded", "--url", canned.url)
    assert done.err == "error: 'loaded' is loaded. Send \"replace\": true. Here that is --replace.\n"


def test_an_error_as_json(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "load", "broken", "--url", canned.url, "--json")
    assert done.code == 1
    assert json.loads(done.out)["error"]["code"] == "adapter_invalid"
    assert done.err.startswith("error: ")


def test_the_key_comes_from_a_variable_a_flag_or_a_file(
    command: Program, canned: CannedServer, tmp_path: Path
) -> None:
    canned.needs_key = True
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    refused = command("adapters", "list", "--url", canned.url)
    assert (refused.code, refused.err) == (1, "error: The API key is missing or wrong.\n")
    assert command("adapters", "list", "--url", canned.url, GRAFT_API_KEY=KEY).code == 0
    assert command("adapters", "list", "--url", canned.url, "--api-key", KEY).code == 0
    assert command("adapters", "list", "--url", canned.url, "--api-key-file", str(file)).code == 0
    missing = command("adapters", "list", "--url", canned.url, "--api-key-file", str(tmp_path / "none"))
    assert (missing.code, missing.out) == (1, "")


def test_nobody_there_is_a_sentence(command: Program) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = command("adapters", "list", "--url", url, "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: no server answers at {url}")
    assert "mlx-graft serve" in done.err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_a_wrong_address_is_a_sentence(command: Program, url: str) -> None:
    done = command("adapters", "list", "--url", url)
    assert done.code == 1
    assert "--url" in done.err


def test_another_kind_of_server_is_told(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "list", "--url", f"{canned.url}/html")
    assert done.code == 1
    assert "502" in done.err


def test_this_machine_is_not_reached_through_a_proxy(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "list", "--url", canned.url, http_proxy="http://127.0.0.1:1")
    assert done.code == 0


@pytest.mark.parametrize("arguments", [["swap"], ["swap", "x", "--none"]])
def test_swap_wants_an_id_or_none(command: Program, canned: CannedServer, arguments: list[str]) -> None:
    done = command("adapters", *arguments, "--url", canned.url)
    assert (done.code, canned.requests) == (2, [])

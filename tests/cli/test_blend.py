"""`mlx-graft adapters blend …` against a small real server: what it asks for, and what it shows."""

from __future__ import annotations

import pytest

from .conftest import CannedServer, Program


def test_parts_and_options_become_one_call(command: Program, canned: CannedServer) -> None:
    done = command(
        "adapters", "blend", "mix", "pirate=0.6", "robot=-1e-1", "haiku@2", "--method", "dare_ties",
        "--density", "0.5", "--rank", "16", "--seed", "7", "--pin", "--activate", "--replace",
        "--url", canned.url,
    )  # fmt: skip
    body = {
        "id": "mix",
        "blend": [{"id": "pirate", "weight": 0.6}, {"id": "robot", "weight": -0.1}, {"id": "haiku@2"}],
        "method": "dare_ties",
        "density": 0.5,
        "rank": 16,
        "seed": 7,
        "pinned": True,
        "activate": True,
        "replace": True,
    }
    assert canned.requests == [("POST", "/v1/adapters", body)]
    assert (done.code, done.err) == (0, "")
    assert (
        done.out
        == "Blended mix by dare_ties: lora, rank 8, scale 20, 60 modules, 1.8 MiB, version 1.\n"
        + ("Left out by its rank: 12.5% of the merged changes on average, 25.0% at worst.\n")
    )


def test_what_is_left_out_is_not_sent(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "blend", "mix", "pirate", "--url", canned.url)
    assert canned.requests == [("POST", "/v1/adapters", {"id": "mix", "blend": [{"id": "pirate"}]})]
    assert "Left out" not in done.out


@pytest.mark.parametrize("arguments", [["mix"], ["mix", "pirate=much"], ["mix", "a", "--rank", "x"]])
def test_wrong_arguments_ask_nothing(command: Program, canned: CannedServer, arguments: list[str]) -> None:
    done = command("adapters", "blend", *arguments, "--url", canned.url)
    assert (done.code, canned.requests) == (2, [])

"""`mlx-graft compare`: what it prints of a comparison. What it asks is checked against a real server."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from server.cli.compare import comparison_view

from .conftest import Program


def answer(index: int, model: str, *tokens: tuple[bytes, list[float]], **fields: Any) -> dict[str, Any]:
    means = [sum(logprobs[at] for _, logprobs in tokens) / len(tokens) for at in range(2) if tokens]
    return {
        "index": index,
        "model": model,
        "message": {"role": "assistant", "content": b"".join(data for data, _ in tokens).decode()},
        "tokens": [{"bytes": list(data), "logprobs": logprobs} for data, logprobs in tokens],
        "mean_logprobs": means or [None, None],
        "mean_differences": [mean - means[index] for mean in means] or [None, None],
        **fields,
    }


def shown(*answers: dict[str, Any], colour: bool = False) -> str:
    console = Console(width=100, color_system="standard" if colour else None, force_terminal=colour)
    with console.capture() as captured:
        console.print(comparison_view({"models": ["base", "pirate"], "answers": list(answers)}))
    return captured.get()


BASE = answer(0, "base", (b"Hello", [-0.5, -1.5]), (b" there", [-0.1, -0.3]))
PIRATE = answer(1, "pirate", (b"Arr", [-9.25, -0.01]), (b", ", [-0.5, -0.25]), (b"hello", [-4.0, -1.0]))


def test_answers_means_and_the_tokens_that_differ_most() -> None:
    lines = shown(BASE, PIRATE).splitlines()
    assert any("Hello there" in line and "Arr, hello" in line for line in lines), "side by side"
    words = [line.split() for line in lines]
    assert ["base", "-0.30", "-0.90", "(-0.60)"] in words
    assert ["pirate", "-4.58", "(-4.16)", "-0.42"] in words
    assert ["pirate", "''", "'Arr'", "-9.25", "-0.01"] in words
    assert ["pirate", "'Arr,", "'", "'hello'", "-4.00", "-1.00"] in words
    assert not any("' there'" in line for line in lines), "both find it as likely"


def test_what_others_find_unlikely_is_in_colour_and_nothing_else_is() -> None:
    text = shown(BASE, PIRATE, colour=True)
    assert "\x1b[1;33mArr\x1b[0m, \x1b[1;33mhello\x1b[0m" in text
    assert "Hello there" in text


def test_no_answer_drives_the_terminal() -> None:
    text = shown(BASE, answer(1, "pirate", (b"\x1b[31m[bold]red\x07", [-9.0, -0.5])))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[31m[bold]red\\x07" in text


def test_parts_of_characters_and_answers_of_nothing() -> None:
    wave = "🌊".encode()
    text = shown(answer(0, "base"), answer(1, "pirate", (wave[:2], [-8.0, -0.1]), (wave[2:], [-7.0, -0.1])))
    assert "🌊" in text
    words = [line.split() for line in text.splitlines()]
    assert ["base", "-", "-"] in words
    assert ["pirate", "''", r"b'\xf0\x9f'", "-8.00", "-0.10"] in words


def test_text_that_is_not_its_tokens_is_shown_plain() -> None:
    cut = answer(1, "pirate", (b"Arr", [-9.0, -0.5]), (b" STOP", [-9.0, -0.5]), message={"content": "Arr"})
    assert "STOP" not in shown(BASE, cut).split("Mean log-probability")[0]


@pytest.mark.parametrize("arguments", [(), ("Hello",), ("--models", "a,b")])
def test_what_it_needs_is_said(command: Program, arguments: tuple[str, ...]) -> None:
    done = command("compare", *arguments)
    assert done.code == 2
    assert "Missing" in done.err

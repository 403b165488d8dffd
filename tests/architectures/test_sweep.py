"""Adapters of every architecture of the installed mlx-lm are exact or refused; the page says which."""

from __future__ import annotations

import pytest

from tests.architectures.sweep import PAGE, Outcome, architectures, outcome, with_table


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What becomes of each architecture."""
    return {name: outcome(name) for name in architectures()}


def test_factors_of_every_architecture_are_exact_or_refused(outcomes: dict[str, Outcome]) -> None:
    assert {name: one.wrong for name, one in outcomes.items() if one.wrong} == {}
    assert [name for name, one in outcomes.items() if one.not_built is None and not one.exact] == []


def test_every_architecture_is_built_but_two(outcomes: dict[str, Outcome]) -> None:
    # One ends the process where a package is missing, one wants tables of signs that only its files have.
    not_built = [name for name, one in outcomes.items() if one.not_built is not None]
    assert not_built == ["olmo", "prism_hadamard_qwen35"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon_h1", {"multiplied"}),
        ("gpt_neox", {"renamed"}),
        ("gpt2", {"renamed", "transposed"}),
        ("granitemoehybrid, dense", {"renamed", "split"}),
        ("hunyuan, fused", {"renamed", "split", "permuted"}),
        ("muse_spark, apart", {"renamed", "joined", "permuted"}),
        ("llama", set()),
    ],
)
def test_what_loading_changes_is_seen(outcomes: dict[str, Outcome], name: str, changes: set[str]) -> None:
    assert outcomes[name].changes == changes


def test_the_page_says_what_the_sweep_finds(outcomes: dict[str, Outcome]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, outcomes), "scripts/architectures writes it anew"

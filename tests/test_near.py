"""Misspelt names find the right one, names of their own do not; names that speak of adapters are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.near import nearest, speaks_of_adapters

KNOWN = [
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stop",
    "seed",
    "model",
    "top_p",
    "n",
]


@given(st.sampled_from([name for name in KNOWN if len(name) > 9]), st.data())
def test_a_letter_that_is_lost_or_doubled_or_swapped_is_found(name: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, len(name) - 3))
    lost = name[:place] + name[place + 1 :]
    doubled = name[:place] + name[place] + name[place:]
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    assert [nearest(wrong, KNOWN) for wrong in (lost, doubled, swapped)] == [name] * 3


@given(st.sampled_from(KNOWN))
def test_another_way_to_write_words_is_found(name: str) -> None:
    camel = "".join(word.capitalize() for word in name.split("_"))
    for wrong in (name.upper(), name.replace("_", "-"), name.replace("_", ""), camel, f" {name}"):
        assert nearest(wrong, KNOWN) == name


NAMES_OF_THEIR_OWN = (
    "id chat_id user_id userId tags mode prompt_id stream_id streaming stops seeds top topic session_id "
    "token tokens max min_tokens provider made_up steps step code"
)


@pytest.mark.parametrize("name", NAMES_OF_THEIR_OWN.split())
def test_names_of_their_own_are_near_to_none(name: str) -> None:
    assert nearest(name, KNOWN) is None


@pytest.mark.parametrize(
    ("name", "speaks"),
    [
        ("lora", True), ("LoRA", True), ("loraPath", True), ("use_lora", True), ("my-QLoRA-name", True),
        ("X-Adapter-Id", True), ("ADAPTERS", True), ("adapterId", True), ("peft_model", True), ("dora", True),
        ("exploration", False), ("flora", False), ("pandora", False), ("adapt", False), ("", False),
    ],
)  # fmt: skip
def test_names_that_speak_of_adapters(name: str, speaks: bool) -> None:
    assert speaks_of_adapters(name) == speaks

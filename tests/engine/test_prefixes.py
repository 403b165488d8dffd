"""Texts in order: every question is answered as by looking at all of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.prefixes import PrefixIndex, TokenText, common_tokens

TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 70_000]), max_size=7)


def shared(a: list[int], b: list[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


@settings(max_examples=300, deadline=None)
@given(st.lists(TOKENS, max_size=12), TOKENS, st.data())
def test_every_answer_is_that_of_a_full_search(
    kept: list[list[int]], wanted: list[int], data: st.DataObject
) -> None:
    index = PrefixIndex()
    for tokens in kept:
        index.add(TokenText.of(tokens))
    if kept:
        gone = data.draw(st.sampled_from(kept))
        index.remove(TokenText.of(gone))
        kept = [tokens for tokens in kept if tokens != gone]
    text = TokenText.of(wanted)
    assert len(index) == len({tuple(tokens) for tokens in kept})
    assert (text in index) == (wanted in kept)

    closest, length = index.closest(text)
    assert length == max((shared(tokens, wanted) for tokens in kept), default=0)
    assert (closest is None) == (length == 0)
    if closest is not None:
        assert common_tokens(closest, text) == length

    beginnings = [tokens for tokens in kept if wanted[: len(tokens)] == tokens]
    longest = index.longest_beginning(text)
    assert longest == (TokenText.of(max(beginnings, key=len)) if beginnings else None)

    longer = index.continuation(text)
    assert (longer is not None) == any(tokens[: len(wanted)] == wanted for tokens in kept)
    assert longer is None or longer.startswith(text)

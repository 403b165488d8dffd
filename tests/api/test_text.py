"""From tokens to text: whatever the tokens' borders, the text is the one that a plain search would cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper, load
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.messages import ChoiceFinished, Token
from server.openai.choice import Choice, Piece, Score
from server.openai.logprobs import chat_logprobs, completion_logprobs
from server.openai.text import TextDecoder

# Few characters, so that stop strings are often found, and often almost.
CHARS = st.sampled_from("aab \n.é日🎉")
TEXTS = st.text(CHARS, max_size=40)
STOPS = st.lists(st.text(CHARS, min_size=1, max_size=5), max_size=4)
relaxed = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path) -> TokenizerWrapper:
    """The demo model's own: byte-level, as most are."""
    return load(demo_model_path)


@pytest.fixture(scope="module")
def decoder(tokenizer: TokenizerWrapper) -> TextDecoder:
    return TextDecoder(tokenizer)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of those, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text
    end, length = min(found)
    return text[: end + length]


def split_tokens(tokenizer: TokenizerWrapper, text: str, borders: list[int]) -> list[int]:
    """Tokens of `text` that respect no word: each part between two borders is encoded by itself."""
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    parts = [text[start:end] for start, end in pairwise(places)]
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


@relaxed
@given(text=TEXTS, stops=STOPS, borders=st.lists(st.integers(0, 40), max_size=12))
def test_any_split_gives_the_text_up_to_the_first_stop(
    tokenizer: TokenizerWrapper, decoder: TextDecoder, text: str, stops: list[str], borders: list[int]
) -> None:
    tokens = split_tokens(tokenizer, text, borders)
    (stream,) = decoder.streams(1, stops, continues=True)
    pieces = [stream.add(token) for token in tokens]
    pieces.append(stream.finish())
    expected = cut(text, stops)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != text)
    assert stream.sent_chars == len(expected)


@relaxed
@given(text=TEXTS)
def test_a_message_loses_its_first_space_and_a_completion_does_not(
    tokenizer: TokenizerWrapper, decoder: TextDecoder, text: str
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for continues, expected in [(True, text), (False, text.removeprefix(" "))]:
        (stream,) = decoder.streams(1, [], continues=continues)
        assert "".join(map(stream.add, tokens)) + stream.finish() == expected


@relaxed
@given(tokens=st.lists(st.integers(17, 49151), max_size=30))
def test_any_tokens_give_their_bytes_as_text(decoder: TextDecoder, tokens: list[int]) -> None:
    data = b"".join(map(decoder.token_bytes, tokens))
    (stream,) = decoder.streams(1, [], continues=True)
    text = "".join(map(stream.add, tokens)) + stream.finish()
    assert text == data.decode("utf-8", "replace") or b"\x00" in data


@relaxed
@given(text=TEXTS, stops=STOPS, borders=st.lists(st.integers(0, 40), max_size=12))
def test_scores_go_out_with_their_text_and_stop_where_it_stops(
    tokenizer: TokenizerWrapper, decoder: TextDecoder, text: str, stops: list[str], borders: list[int]
) -> None:
    tokens = split_tokens(tokenizer, text, borders)
    (stream,) = decoder.streams(1, stops, continues=True)
    choice = Choice(0, stream)
    pieces = [choice.add(Token(0, token, -0.5)) for token in tokens]
    pieces.append(choice.end(ChoiceFinished(0, "length", len(tokens))))
    sent = [piece for piece in pieces if piece is not None]
    scores = [score for piece in sent for score in piece.scores]
    kept = "".join(piece.text for piece in sent)
    assert kept == cut(text, stops)
    assert [score.token for score in scores] == tokens[: len(scores)]
    assert [score.offset_chars for score in scores] == sorted(score.offset_chars for score in scores)
    assert [piece.reason for piece in sent if piece.reason] == ["stop" if kept != text else "length"]
    assert sent[-1].reason is not None
    if kept == text:
        assert len(scores) == len(tokens) == choice.completion_tokens
    else:
        assert all(score.offset_chars < len(kept) for score in scores)


def test_several_streams_do_not_share_their_state(tokenizer: TokenizerWrapper, decoder: TextDecoder) -> None:
    one, two = decoder.streams(2, ["b"], continues=True)
    assert one.add(tokenizer.encode("ab", add_special_tokens=False)[0]) in ("a", "ab")
    for token in tokenizer.encode("ab", add_special_tokens=False):
        one.add(token)
    assert one.stopped
    assert not two.stopped
    assert two.decoded_chars == 0


def test_what_might_begin_a_stop_string_is_held_back_and_given_out_at_the_end(
    tokenizer: TokenizerWrapper, decoder: TextDecoder
) -> None:
    (stream,) = decoder.streams(1, ["###"], continues=True)
    (hash_token,) = tokenizer.encode("#", add_special_tokens=False)
    assert [stream.add(hash_token), stream.add(hash_token)] == ["", ""]
    assert stream.finish() == "##"
    assert not stream.stopped


def sentencepiece_tokenizer() -> TokenizerWrapper:
    """Of the kind that Llama 2 has: a mark for spaces, and byte tokens for what has no token of its own."""
    words = ["<unk>", "▁Paris", "▁a", "a", "▁", "<0xC3>", "<0xA9>"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return TokenizerWrapper(fast, SPMStreamingDetokenizer)  # pyright: ignore[reportArgumentType]


def test_sentencepiece_tokens() -> None:
    decoder = TextDecoder(sentencepiece_tokenizer())
    assert [decoder.token_bytes(token) for token in (1, 3, 5, 6, 99)] == [
        b" Paris",
        b"a",
        b"\xc3",
        b"\xa9",
        b"",
    ]
    for continues, text in [(True, " Paris aé"), (False, "Paris aé")]:
        (stream,) = decoder.streams(1, [], continues=continues)
        assert "".join(map(stream.add, [1, 2, 5, 6])) + stream.finish() == text


def test_tokens_of_any_other_kind(tokenizer: TokenizerWrapper) -> None:
    decoder = TextDecoder(TokenizerWrapper(tokenizer._tokenizer, NaiveStreamingDetokenizer))
    tokens = tokenizer.encode(" Paris, é日", add_special_tokens=False)
    (stream,) = decoder.streams(1, ["日"], continues=True)
    assert "".join(map(stream.add, tokens)) + stream.finish() == " Paris, é"
    assert decoder.token_bytes(tokens[0]) == b" Paris"


def test_impossible_tokens_have_a_logprob_that_json_can_say() -> None:
    score = Score(1, -0.25, ((1, -0.25), (2, float("-inf"))), 0)
    assert Piece(0, "a", (score,)).scores == (score,)
    chat = chat_logprobs([score], lambda token: b"\xff" if token == 2 else b"a")
    assert chat["content"][0]["top_logprobs"][1] == {"token": "\ufffd", "logprob": -9999.0, "bytes": [255]}
    completion = completion_logprobs([score], lambda token: b"%d" % token)
    assert completion["top_logprobs"] == [{"1": -0.25, "2": -9999.0}]

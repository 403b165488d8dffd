"""From tokens to text: whatever the tokens' borders, the text is the one that a plain search would cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
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
    assert text == data.decode("utf-8", "replace")


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


@relaxed
@given(tokens=st.lists(st.integers(18, 49151), max_size=24))
def test_a_message_is_the_text_of_mlx_lm(
    tokenizer: TokenizerWrapper, decoder: TextDecoder, tokens: list[int]
) -> None:
    assume(b"\x00" not in b"".join(map(decoder.token_bytes, tokens)))  # where mlx-lm's is another character
    reference = tokenizer.detokenizer
    for token in tokens:
        reference.add_token(token)
    reference.finalize()
    (stream,) = decoder.streams(1, [], continues=False)
    assert "".join(map(stream.add, tokens)) + stream.finish() == reference.text


def places_of_characters(data: bytes) -> list[int]:
    """For each byte, which character of the text it belongs to; what is no UTF-8 is replaced by U+FFFD."""
    places: list[int] = []
    while len(places) < len(data):
        rest = data[len(places) :]
        try:
            valid, invalid_bytes = rest.decode(), 0
        except UnicodeDecodeError as error:
            valid, invalid_bytes = rest[: error.start].decode(), error.end - error.start
        for length in [*(len(char.encode()) for char in valid), *([invalid_bytes] if invalid_bytes else [])]:
            places += [places[-1] + 1 if places else 0] * length
    return places


def said(decoder: TextDecoder, tokens: list[int], stops: list[str]) -> tuple[str, list[Score], bool]:
    """(The text of a completion, its scores, whether a stop string ended it)."""
    (stream,) = decoder.streams(1, stops, continues=True)
    choice = Choice(0, stream)
    pieces = [choice.add(Token(0, token, -0.5)) for token in tokens]
    pieces.append(choice.end(ChoiceFinished(0, "length", len(tokens))))
    sent = [piece for piece in pieces if piece is not None]
    scores = [score for piece in sent for score in piece.scores]
    return "".join(piece.text for piece in sent), scores, stream.stopped


# Byte-level: the first ids after the special ones are single bytes, 0 and parts of characters among them.
ANY_TOKENS = st.lists(st.one_of(st.integers(17, 272), st.integers(0, 49151), st.just(60_000)), max_size=24)


@relaxed
@given(tokens=ANY_TOKENS, stops=st.lists(st.text("a 2é\ufffd", min_size=1, max_size=2), max_size=3))
def test_each_score_is_at_the_place_of_its_text_and_no_other_is_sent(
    decoder: TextDecoder, tokens: list[int], stops: list[str]
) -> None:
    text, scores, stopped = said(decoder, tokens, stops)
    data = list(map(decoder.token_bytes, tokens))
    whole = b"".join(data)
    places = [*places_of_characters(whole), len(whole.decode("utf-8", "replace"))]
    starts = [sum(map(len, data[:index])) for index in range(len(tokens))]
    assert text == cut(whole.decode("utf-8", "replace"), stops)
    assert [score.token for score in scores] == tokens[: len(scores)]
    for score, start, bytes_ in zip(scores, starts, data, strict=False):
        assert score.offset_chars == places[start] or not bytes_
    if not stopped:
        assert len(scores) == len(tokens)
        return
    left_out = [place for place, bytes_ in zip(map(places.__getitem__, starts), data, strict=True) if bytes_]
    kept = [place for place in left_out if place < len(text)]
    assert [score.offset_chars for score in scores if decoder.token_bytes(score.token)] == kept


@relaxed
@given(tokens=ANY_TOKENS)
def test_the_tokens_of_completions_joined_are_their_text(decoder: TextDecoder, tokens: list[int]) -> None:
    text, scores, _ = said(decoder, tokens, [])
    named = completion_logprobs(scores, decoder.token_bytes)
    data = b"".join(bytes_named(name) for name in named["tokens"])
    assert data.decode("utf-8", "replace") == text
    chat = chat_logprobs(scores, decoder.token_bytes)["content"]
    assert b"".join(bytes(token["bytes"]) for token in chat) == data
    assert [token["token"] for token in chat] == named["tokens"]


def bytes_named(name: str) -> bytes:
    """What a token's name stands for, by the rule that clients read."""
    if not name.startswith("bytes:"):
        return name.encode()
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))


def test_several_streams_do_not_share_their_state(tokenizer: TokenizerWrapper, decoder: TextDecoder) -> None:
    one, two = decoder.streams(2, ["b"], continues=True)
    assert one.add(tokenizer.encode("ab", add_special_tokens=False)[0]) in ("a", "ab")
    for token in tokenizer.encode("ab", add_special_tokens=False):
        one.add(token)
    assert one.stopped
    assert not two.stopped
    assert two.token_offset_chars == two.sent_chars == 0


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


@pytest.mark.parametrize("cleans", [False, True])
def test_a_lone_space_has_a_place_in_texts_of_any_other_kind(
    tokenizer: TokenizerWrapper, cleans: bool
) -> None:
    words = {"<unk>": 0, "a": 1, "▁": 2, "2": 3, "▁b": 4, "<0xC3>": 5, ",": 6}
    inner = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=cleans)
    decoder = TextDecoder(TokenizerWrapper(fast, NaiveStreamingDetokenizer))  # pyright: ignore[reportArgumentType]
    text, scores, _ = said(decoder, [1, 2, 3, 4], [])
    assert (text, [score.offset_chars for score in scores]) == ("a 2 b", [0, 1, 2, 3])
    text, scores, _ = said(decoder, [1, 2, 3, 4], ["2"])
    assert (text, [score.token for score in scores]) == ("a ", [1, 2])
    text, scores, _ = said(decoder, [1, 5, 1, 2, 3], ["2"])
    assert (text, [score.offset_chars for score in scores]) == ("a\ufffda ", [0, 1, 2, 3])


def test_impossible_tokens_have_a_logprob_that_json_can_say() -> None:
    score = Score(1, -0.25, ((1, -0.25), (2, float("-inf"))), 0)
    assert Piece(0, "a", (score,)).scores == (score,)
    chat = chat_logprobs([score], lambda token: b"\xff" if token == 2 else b"a")
    assert chat["content"][0]["top_logprobs"][1] == {
        "token": "bytes:\\xff",
        "logprob": -9999.0,
        "bytes": [255],
    }
    completion = completion_logprobs([score], lambda token: b"%d" % token)
    assert completion["top_logprobs"] == [{"1": -0.25, "2": -9999.0}]


def test_alternatives_of_completions_hold_the_chosen_token_and_keep_tokens_of_one_text_apart() -> None:
    texts = {1: b"a", 2: b"\xf0\x9f", 3: b"\xf0\x9e", 4: b"a", 5: b"b", 6: b"b"}
    top = ((4, -0.5), (5, -1.0), (2, -1.5), (3, -1.75), (6, -2.0))
    named = completion_logprobs([Score(1, -3.0, top, 0)], texts.__getitem__)
    assert named["tokens"] == ["a"]
    assert list(named["top_logprobs"][0].items()) == [
        ("token_id:4", -0.5),
        ("b", -1.0),
        ("bytes:\\xf0\\x9f", -1.5),
        ("bytes:\\xf0\\x9e", -1.75),
        ("token_id:6", -2.0),
        ("a", -3.0),
    ]
    assert completion_logprobs([Score(5, -1.0, (), 0)], texts.__getitem__)["top_logprobs"] == [{"b": -1.0}]

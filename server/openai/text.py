"""From tokens back to text, piece by piece, up to the first stop string.

A stop string is found in the text, wherever the tokens' borders fall. Of several, the one whose last
character comes first ends the text (of two that end together, the longer): what is sent depends on the
text alone, not on how it was cut into tokens. Knows no HTTP, no choices and no log-probabilities. Runs on
the event loop.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    StreamingDetokenizer,
    TokenizerWrapper,
)

__all__ = ["TextDecoder", "TextStream"]

_RUNNING = "text"


class _Characters(Protocol):
    """The characters of one choice's tokens."""

    def add(self, token: int) -> tuple[int, str]:
        """(Where the token's text begins in the text of all tokens, the characters that are certain now)."""
        ...

    def finish(self) -> str:
        """The characters that were not certain, when no token will follow."""
        ...


class _BytesAsCharacters:
    """Tokens that stand for bytes, which are UTF-8 across the tokens' borders.

    A token's text begins with the character that its first byte belongs to, be it the byte in the middle of
    one. `drops_space` leaves out a space at the very beginning.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, drops_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = drops_space
        self._chars = 0

    def add(self, token: int) -> tuple[int, str]:
        data = self._token_bytes(token)
        undecided, _ = self._decoder.getstate()
        # What is undecided and the first byte are one character, unless they do not belong together.
        chars_before = max(len((undecided + data[:1]).decode("utf-8", "replace")) - 1, 0)
        begins = self._chars + chars_before
        return begins, self._count(self._decoder.decode(data))

    def finish(self) -> str:
        return self._count(self._decoder.decode(b"", final=True))

    def _count(self, text: str) -> str:
        if self._drops_space and text:
            text = text.removeprefix(" ")
            self._drops_space = False
        self._chars += len(text)
        return text


class _DetokenizerAsCharacters:
    """Tokens whose text depends on those before them, so that only decoding all of them tells it.

    `own_bytes` is what a token stands for in the middle of a text.
    """

    def __init__(self, detokenizer: StreamingDetokenizer, own_bytes: Callable[[int], bytes]) -> None:
        self._detokenizer = detokenizer
        self._own_bytes = own_bytes
        self._chars = 0

    def add(self, token: int) -> tuple[int, str]:
        self._detokenizer.add_token(token)
        text = self._detokenizer.last_segment
        begins, self._chars = self._chars, self._chars + len(text)
        # A space or a part of a character that was held back belongs to the tokens before.
        own = self._own_bytes(token).decode("utf-8", "replace")
        return self._chars - len(own) if own and text.endswith(own) else begins, text

    def finish(self) -> str:
        self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        self._chars += len(text)
        return text


class TextStream:
    """The text of one choice as its tokens come.

    What may still turn out to be the beginning of a stop string, or of a character of several tokens, is held
    back until that is decided.
    """

    def __init__(self, characters: _Characters, machine: TextStateMachine) -> None:
        self._characters = characters
        self._state = machine.make_state(_RUNNING)
        self._token_offset_chars = 0
        self._sent_chars = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; from then on there is no more text."""
        return self._state[0] is None

    @property
    def token_offset_chars(self) -> int:
        """Where the text of the last token begins, counted from the first character of the text."""
        return self._token_offset_chars

    @property
    def sent_chars(self) -> int:
        """Characters that were given out."""
        return self._sent_chars

    def add(self, token: int) -> str:
        """The text that is certain now, often none."""
        if self.stopped:
            return ""
        self._token_offset_chars, text = self._characters.add(token)
        return self._pass(text)

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        text = self._pass(self._characters.finish())
        if self.stopped:
            return text
        self._state, rest, _ = TextStateMachine.flush(self._state)
        self._sent_chars += len(rest)
        return text + rest

    def _pass(self, segment: str) -> str:
        self._state, text, _ = TextStateMachine.step(self._state, segment)
        self._sent_chars += len(text)
        return text


class TextDecoder:
    """Makes the text streams of a model's tokenizer, and tells single tokens' bytes.

    Byte-level and SentencePiece tokenizers say which bytes a token stands for, and a text is those bytes one
    after the other. mlx-lm's detokenizers of the two say the same, but hold back lone spaces, and fail at ids
    without a token and at the byte 0. For other tokenizers mlx-lm's detokenizer is used.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._prototype = tokenizer.detokenizer
        self._neutral = tokenizer.encode("a", add_special_tokens=False)
        self._neutral_text = tokenizer.decode(self._neutral)
        self._bytes_of_char = _bytes_of_chars()

    def streams(self, count: int, stop: Sequence[str], *, continues: bool) -> list[TextStream]:
        """`count` streams that end at the same stop strings.

        A message begins a text of its own, whose first space is dropped, as detokenizers do. A completion
        `continues` its prompt, so that the space between the two belongs to it.
        """
        machine = TextStateMachine({_RUNNING: [(text, None) for text in stop]})
        return [TextStream(self._characters(continues), machine) for _ in range(count)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of a part of a character are no text by themselves."""
        detokenizer = self._prototype
        if isinstance(detokenizer, SPMStreamingDetokenizer):
            known = 0 <= token < len(detokenizer.tokenmap)
            return detokenizer.tokenmap[token].replace("\u2581".encode(), b" ") if known else b""
        if isinstance(detokenizer, BPEStreamingDetokenizer):
            known = 0 <= token < len(detokenizer.tokenmap)
            chars = (detokenizer.tokenmap[token] or "") if known else ""
            return b"".join(self._bytes_of_char.get(char) or char.encode() for char in chars)
        text = self._tokenizer.decode([*self._neutral, token])
        if text.startswith(self._neutral_text):
            return text.removeprefix(self._neutral_text).encode()
        return self._tokenizer.decode([token]).encode()

    def _characters(self, continues: bool) -> _Characters:
        detokenizer = self._tokenizer.detokenizer
        if isinstance(detokenizer, (SPMStreamingDetokenizer, BPEStreamingDetokenizer)):
            trims = getattr(detokenizer, "trim_space", True)  # of SentencePiece alone, and not of all
            return _BytesAsCharacters(self.token_bytes, drops_space=trims and not continues)
        if continues:
            for token in self._neutral:
                detokenizer.add_token(token)
            _ = detokenizer.last_segment  # reading it moves the detokenizer past the neutral text
        return _DetokenizerAsCharacters(detokenizer, self.token_bytes)


def _bytes_of_chars() -> dict[str, bytes]:
    """GPT-2's alphabet (openai/gpt-2, encoder.py): printable bytes are themselves, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}

"""From tokens back to text, piece by piece, up to the first stop string.

A stop string is found in the text, wherever the tokens' borders fall. Of several, the one whose last
character comes first ends the text (of two that end together, the longer): what is sent depends on the
text alone, not on how it was cut into tokens. Knows no HTTP, no choices and no log-probabilities. Runs on
the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    StreamingDetokenizer,
    TokenizerWrapper,
)

__all__ = ["TextDecoder", "TextStream"]

_RUNNING = "text"


class TextStream:
    """The text of one choice as its tokens come.

    What may still turn out to be the beginning of a stop string, or of a character of several tokens, is held
    back until that is decided.
    """

    def __init__(self, detokenizer: StreamingDetokenizer, machine: TextStateMachine) -> None:
        self._detokenizer = detokenizer
        self._state = machine.make_state(_RUNNING)
        self._decoded_chars = 0
        self._sent_chars = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; from then on there is no more text."""
        return self._state[0] is None

    @property
    def decoded_chars(self) -> int:
        """Characters so far, those held back and those of a stop string included."""
        return self._decoded_chars

    @property
    def sent_chars(self) -> int:
        """Characters that were given out."""
        return self._sent_chars

    def add(self, token: int) -> str:
        """The text that is certain now, often none."""
        if self.stopped:
            return ""
        self._detokenizer.add_token(token)
        return self._pass(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        text = self._pass(self._detokenizer.last_segment)
        if self.stopped:
            return text
        self._state, rest, _ = TextStateMachine.flush(self._state)
        self._sent_chars += len(rest)
        return text + rest

    def _pass(self, segment: str) -> str:
        self._decoded_chars += len(segment)
        self._state, text, _ = TextStateMachine.step(self._state, segment)
        self._sent_chars += len(text)
        return text


class TextDecoder:
    """Makes the text streams of a model's tokenizer, and tells single tokens' bytes."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._prototype = tokenizer.detokenizer
        self._neutral = tokenizer.encode("a", add_special_tokens=False)
        self._bytes_of_char = _bytes_of_chars()

    def streams(self, count: int, stop: Sequence[str], *, continues: bool) -> list[TextStream]:
        """`count` streams that end at the same stop strings.

        A message begins a text of its own, and detokenizers drop its first space. A completion
        `continues` its prompt, so that the space between the two belongs to it.
        """
        machine = TextStateMachine({_RUNNING: [(text, None) for text in stop]})
        return [TextStream(self._detokenizer(continues), machine) for _ in range(count)]

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
        return self._tokenizer.decode([token]).encode()

    def _detokenizer(self, continues: bool) -> StreamingDetokenizer:
        detokenizer = self._tokenizer.detokenizer
        if continues:
            for token in self._neutral:
                detokenizer.add_token(token)
            _ = detokenizer.last_segment  # reading it moves the detokenizer past the neutral text
        return detokenizer


def _bytes_of_chars() -> dict[str, bytes]:
    """GPT-2's alphabet (openai/gpt-2, encoder.py): printable bytes are themselves, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}

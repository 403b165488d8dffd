"""The short conversations on which a fused model is compared with the adapted one. Knows no model.

They are neutral, so that what shows is the adapter, and have answers, so that tokens of an answer are
compared as well as those of a question. Runs on the thread that owns the tokenizer.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = ["CONVERSATIONS", "probe_rows"]

CONVERSATIONS = (
    ("How many days are there in a week?", "There are seven days in a week."),
    ("What do cows eat?", "Cows eat grass and hay, and they drink a lot of water."),
    ("Write a sentence about the sea.", "The sea was calm, and the small boats came home before dark."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue comes from everywhere."),
)

_LONGEST_TOKENS = 128


def probe_rows(tokenizer: TokenizerWrapper, context_tokens: int) -> list[list[int]]:
    """The token ids of each conversation, in the model's chat template if it has one that takes it."""
    longest = max(1, min(_LONGEST_TOKENS, context_tokens))
    rows = [_tokens(tokenizer, question, answer)[:longest] for question, answer in CONVERSATIONS]
    return [row for row in rows if row]


def _tokens(tokenizer: Any, question: str, answer: str) -> list[int]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if tokenizer.has_chat_template:
        try:
            return list(tokenizer.apply_chat_template(messages))
        except TemplateError:
            pass  # a template that wants other roles; the plain text is as good a probe
    return list(tokenizer.encode(f"{question}\n{answer}"))

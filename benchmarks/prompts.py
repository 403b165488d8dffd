"""Questions with long answers, as many as wanted, none twice. Knows no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

__all__ = ["instruction", "passages", "story"]

_SCATTER = 387_420_489  # without a common factor with a million, so that no two numbers fall together
_SUBJECTS = (
    "a lighthouse keeper who finds a letter in a bottle",
    "a baker whose bread makes people remember",
    "a clockmaker who repairs the town's only clock",
    "a girl who draws maps of places that do not exist",
    "a ferryman who carries one passenger at midnight",
    "a gardener who grows flowers in winter",
    "a violinist who lost her favourite instrument",
    "a mountain guide who meets an old friend",
    "a librarian who discovers a hidden room",
    "a fisherman who catches a silver key",
    "a teacher who starts a school in a desert",
    "a painter who paints only with blue",
    "a pilot who lands on a forgotten island",
    "a shepherd who follows a falling star",
    "a carpenter who builds a bridge alone",
    "a doctor who travels from village to village",
)


def instruction(number: int) -> str:
    """A system message of six digits that no other number below a million has.

    It stands before all that is the same in prompts, a template's own words included, so that a cache of
    earlier prompts spares a side hardly more than the template's first mark: the numbers are scattered, so
    that neighbours differ in their first digits. All have as many tokens where digits are tokens.
    """
    return f"{number * _SCATTER % 1_000_000:06d}."


def story(number: int) -> str:
    """A question with a long answer."""
    return f"Tell a long story about {_SUBJECTS[number % len(_SUBJECTS)]}."


def passages(model_path: Path, first_number: int, lengths: Sequence[int]) -> list[str]:
    """Texts that begin with numbers from `first_number` on, of about so many tokens of the model's each.

    Raises: ValueError if the folder holds no tokenizer.json.
    """
    file = model_path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"expected a tokenizer.json in {model_path}, which has none")
    tokenizer = Tokenizer.from_file(str(file))
    return [_passage(tokenizer, first_number + at, length) for at, length in enumerate(lengths)]


def _passage(tokenizer: Tokenizer, number: int, tokens: int) -> str:
    sentences = [instruction(number)]
    # Each sentence has more than five tokens.
    for index in range(tokens // 5):
        sentences.append(f"Chapter {index + 1} tells of {_SUBJECTS[(number + index) % len(_SUBJECTS)]}.")
    encoding = tokenizer.encode(" ".join(sentences), add_special_tokens=False)
    return tokenizer.decode(encoding.ids[:tokens])

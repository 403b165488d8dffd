"""Questions with long answers, as many as wanted, none twice. Knows no tokenizer and no server."""

from __future__ import annotations

__all__ = ["prompts"]

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


def prompts(round_index: int, count: int) -> list[str]:
    """The `count` questions of a round, which begins at 0.

    All differ from each other and from those of all other rounds with the same count, near their
    beginning: so no prompt cache can spare a side more than the chat template.
    """
    first = round_index * count
    return [
        f"Story number {number + 1}: write a long and detailed story about "
        f"{_SUBJECTS[number % len(_SUBJECTS)]}. Tell it in at least ten paragraphs."
        for number in range(first, first + count)
    ]
